"""How weights come into packseq.nn.MambaLM: from mamba-ssm, and from Hugging Face, whose own Mamba is compared where it
is installed."""

import json

import packseq.compat.mamba_ssm as compat
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from mamba_models import CONFIG, D_MODEL, LENGTHS, SIZES, batch, lm_weights, make_lm, tokens
from operators import boundaries, random
from packseq.nn import MambaConfig, MambaLM
from torch import Tensor

F32, BF16 = torch.float32, torch.bfloat16

# ---- weights


def assert_same_model(got: MambaLM, expected: MambaLM) -> None:
    assert got.config == expected.config
    expected = expected.state_dict()
    assert got.state_dict().keys() == expected.keys()
    for name, x in got.state_dict().items():
        assert_same_bits(name, x, expected[name])


def hf_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("embedding.", "embeddings."): x for name, x in weights.items()}


MAMBA_SSM = {
    **{"d_model": D_MODEL, "n_layer": 3, "vocab_size": 61, "pad_vocab_size_multiple": 67, "rms_norm": True},
    **{"residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True, "d_intermediate": 0},
    "ssm_cfg": {"layer": "Mamba1", "d_state": 16, "dt_rank": 32, "bias": True},
}


def test_weights_of_both_libraries():
    expected = make_lm()
    assert not expected.training
    assert_same_model(MambaLM.from_mamba_ssm(lm_weights(), MAMBA_SSM), expected)
    assert_same_model(MambaLM.from_huggingface(hf_names(lm_weights()), SIZES), expected)
    headless = {n.removeprefix("backbone."): x for n, x in lm_weights().items() if n != "lm_head.weight"}
    assert_same_model(MambaLM.from_mamba_ssm(headless, CONFIG), expected)
    assert_same_model(MambaLM.from_huggingface(hf_names(headless), CONFIG), expected)


def test_untied_head():
    config, head = MambaConfig(**SIZES, tie_word_embeddings=False), random(67, D_MODEL, seed="head", dtype=F32)
    model = MambaLM.from_mamba_ssm(lm_weights() | {"lm_head.weight": head}, config)
    hidden = model.hidden_states(tokens(5))
    assert_same_bits("logits", model.logits(hidden), F.linear(hidden, head))
    with pytest.raises(ValueError, match=r"lm_head.weight must be the embedding, as tie_word_embeddings says"):
        MambaLM.from_mamba_ssm(lm_weights() | {"lm_head.weight": head}, CONFIG)


def test_weights_keep_their_own_dtypes():
    mixed = {n: x if n.endswith(("A_log", ".D")) else x.to(BF16) for n, x in lm_weights().items()}
    model = MambaLM.from_mamba_ssm(mixed, CONFIG)
    assert model.layers[0].mixer.A_log.dtype == F32
    assert model.layers[0].mixer.in_proj.weight.dtype == BF16
    assert model(tokens(4)).dtype == BF16
    assert {p.dtype for p in MambaLM.from_mamba_ssm(mixed, CONFIG, dtype=F32).parameters()} == {F32}
    mixed["backbone.norm_f.weight"].zero_()
    assert model.norm_f.weight.any()


def test_folders_and_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    expected = make_lm()
    theirs, hf, parts = (tmp_path / name for name in ("mamba-ssm", "hf", "parts"))
    for folder, config in ((theirs, MAMBA_SSM), (hf, SIZES), (parts, SIZES)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"something_else": 7}))
    with pytest.raises(ValueError, match=r"hold, a model.safetensors or a pytorch_model.bin; found \['config.json'\]"):
        MambaLM.from_mamba_ssm(theirs)
    torch.save(lm_weights(), theirs / "pytorch_model.bin")
    assert_same_model(MambaLM.from_mamba_ssm(theirs), expected)
    assert_same_model(MambaLM.from_mamba_ssm(theirs / "pytorch_model.bin"), expected)
    weights = {n: x.clone() for n, x in hf_names(lm_weights()).items() if n != "lm_head.weight"}
    safetensors.save_file(weights, hf / "model.safetensors")
    assert_same_model(MambaLM.from_huggingface(hf), expected)
    files = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        safetensors.save_file({n: x for n, x in weights.items() if files[n] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same_model(MambaLM.from_huggingface(parts), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.layers.1.mixer.D"), "weights lack backbone.layers.1.mixer.D$"),
        (lambda w: w.pop("backbone.embedding.weight"), "lack backbone.embedding.weight: they are not of a Mamba model"),
        (lambda w: w.update({"backbone.layers.3.mixer.D": torch.zeros(64)}), "not all Mamba's: backbone.layers.3"),
        (
            lambda w: w.update({"backbone.norm_f.weight": torch.zeros(5)}),
            r"norm_f.weight is \(5,\) and must be \(32,\)",
        ),
    ],
)
def test_wrong_weights_are_named(change, message):
    weights = lm_weights()
    change(weights)
    with pytest.raises(ValueError, match=message):
        MambaLM.from_mamba_ssm(weights, CONFIG)


@pytest.mark.parametrize(
    ("convert", "change", "message"),
    [
        (MambaConfig.from_huggingface, {"model_type": "mamba2"}, "model_type must be 'mamba', got 'mamba2'"),
        (MambaConfig.from_huggingface, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (MambaConfig.from_mamba_ssm, {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer must be 'Mamba1', got 'Mamba2'"),
        (MambaConfig.from_mamba_ssm, {"ssm_cfg": {"headdim": 64}}, "options of Mamba-1 only, got headdim"),
        (MambaConfig.from_mamba_ssm, {"attn_layer_idx": [1]}, r"attn_layer_idx must be \[\], got \[1\]"),
        (MambaConfig.from_mamba_ssm, {"rms_norm": False}, "rms_norm must be True, got False"),
        (MambaConfig.from_mamba_ssm, {"d_intermediate": 5}, "d_intermediate must be 0, got 5"),
    ],
)
def test_unsupported_configurations_are_named(convert, change, message):
    with pytest.raises(ValueError, match=f"^MambaConfig: .*{message}"):
        convert(change)


# ---- Hugging Face's own


@pytest.fixture
def theirs(monkeypatch, device):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES))
    with torch.no_grad():
        for p in model.parameters():  # all alive, norms and biases too
            p += torch.randn_like(p) / 10
    return model.to(device)


def padded(device: str, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids [batch, longest] and where they are real."""
    ids = [tokens(n, seed) for seed, n in enumerate(lengths) if n]
    mask = [torch.ones_like(x) for x in ids]
    return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True).to(device) for x in (ids, mask))


@torch.no_grad()
def test_same_logits_as_hugging_face(theirs, device):
    theirs.eval()
    ours = MambaLM.from_huggingface(theirs)
    ids, mask = padded(device, LENGTHS)
    logits = theirs(ids, attention_mask=mask, use_cache=False).logits
    limit = 2e-5 * logits.abs().max().item()
    packed = ours(*batch(device=device))
    torch.testing.assert_close(packed, logits[mask.bool()], rtol=0, atol=limit)
    rows = ours(ids.flatten(), boundaries([ids.shape[1]] * len(ids), device)).view_as(logits)
    torch.testing.assert_close(rows[mask.bool()], logits[mask.bool()], rtol=0, atol=limit)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [ids[0, :5], ids[1, :17]]
    for prompt, added in zip(prompts, ours.generate(prompts, 6), strict=True):
        assert torch.equal(added, theirs.generate(prompt[None], **options)[0, len(prompt) :])


def test_one_training_step_has_the_same_gradients_as_hugging_face(theirs, device):
    ours = MambaLM.from_huggingface(theirs.train()).train()
    ids, mask = padded(device, LENGTHS)
    theirs(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    packed, cu_seqlens = batch(device=device)
    targets = packed.roll(-1)
    targets[cu_seqlens[1:].long() - 1] = -100
    F.cross_entropy(ours(packed, cu_seqlens), targets).backward()
    expected = MambaLM.from_huggingface({n: p.grad for n, p in theirs.named_parameters()}, CONFIG)
    for (name, p), grad in zip(ours.named_parameters(), expected.parameters(), strict=True):
        limit = 2e-5 * grad.abs().max().item()
        torch.testing.assert_close(p.grad, grad.detach(), rtol=1e-4, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


def test_hugging_face_runs_on_the_compatible_functions(theirs, device, monkeypatch):
    from transformers.models.mamba import modeling_mamba

    ids, _ = padded(device, [19, 19])
    expected = theirs.eval()(ids, use_cache=False).logits
    greedy = theirs.generate(ids[:, :7], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)

    def without_fallback_options(*args, use_mambapy=None, use_associative_scan=None, **options):
        return compat.selective_scan_fn(*args, **options)

    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", compat.mamba_inner_fn)
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", without_fallback_options)
    monkeypatch.setattr(modeling_mamba, "mamba_selective_state_update", compat.selective_state_update)
    monkeypatch.setattr(modeling_mamba, "causal_conv1d_fn", compat.causal_conv1d_fn)
    monkeypatch.setattr(modeling_mamba, "causal_conv1d_update", compat.causal_conv1d_update)
    limit = 2e-5 * expected.abs().max().item()
    for training in (False, True):
        logits = theirs.train(training)(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=limit)
    got = theirs.eval().generate(ids[:, :7], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, greedy)
