"""packseq.nn.BertEncoder against BERT from its formulas, written out here, and against Hugging Face's where it is
installed; and how weights come in.

Attention gives a sequence the same bits in any pack. The matrix products around it are the BLAS library's, which may
choose another order of summation for another number of rows. So of the whole encoder it holds, and is tested: with the
same rows, whatever the other sequences hold (NaN too) and however they are cut, a sequence's bits are the same;
alone and packed, it differs by rounding only. (Sizes here are multiples of 32: oneDNN's bfloat16 product for AMX reads
on into the next row where they are not, and multiplies what it finds by zero, which lets NaN through.)
"""

import json
import math

import packseq
import pytest
import torch
from compare import assert_accurate, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from operators import boundaries, captured, random
from packseq.nn import BertConfig, BertEncoder, first_rows, mean_pool, sequences_and_positions
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = [5, 0, 70, 1, 33]
TOTAL = sum(LENGTHS)
SIZES = {
    **{"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"intermediate_size": 160, "max_position_embeddings": 80, "type_vocab_size": 3},
}
CONFIG = BertConfig(**SIZES)

dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t).removeprefix("torch."))


def hf_weights(config: BertConfig = CONFIG, pooler: bool = True) -> dict[str, Tensor]:
    """Random weights by the names of Hugging Face, all of them alive: biases and norms too."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, hidden),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, hidden),
    }
    dense = {"pooler.dense": (hidden, hidden)} if pooler else {}
    norms = ["embeddings.LayerNorm"]
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        dense |= {f"{layer}.attention.self.{x}": (hidden, hidden) for x in ("query", "key", "value")}
        dense |= {f"{layer}.attention.output.dense": (hidden, hidden)}
        dense |= {f"{layer}.intermediate.dense": (inner, hidden), f"{layer}.output.dense": (hidden, inner)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {name: random(*shape, seed=name, dtype=F32) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    for name in norms:
        weights[f"{name}.weight"] = 1 + random(hidden, seed=f"{name} weight", dtype=F32) / 8
        weights[f"{name}.bias"] = random(hidden, seed=f"{name} bias", dtype=F32) / 8
    return weights


ACTIVATIONS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
ACTIVATIONS["gelu_fast"] = ACTIVATIONS["gelu_pytorch_tanh"] = ACTIVATIONS["gelu_new"]


def plain_bert(weights: dict[str, Tensor], ids: Tensor, types: Tensor, config: BertConfig = CONFIG) -> Tensor:
    """One sequence through BERT, step by step, in the dtype of the weights."""

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + config.layer_norm_eps)
        return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: Tensor) -> Tensor:
        return x.view(len(ids), config.num_attention_heads, -1).transpose(0, 1)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.token_type_embeddings.weight"][types]
    x = norm(x + weights["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (heads(dense(x, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        shares = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (shares @ v).transpose(0, 1).reshape(x.shape)
        x = norm(x + dense(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        inner = ACTIVATIONS[config.hidden_act](dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 100, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))


def batch(lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, token types and their boundaries."""
    ids = torch.cat([tokens(n, seed) for seed, n in enumerate(lengths)])
    return ids, ids % CONFIG.type_vocab_size, boundaries(lengths)


def make(device: str = "cpu", dtype: torch.dtype = F32, config: BertConfig = CONFIG) -> BertEncoder:
    return BertEncoder.from_huggingface(hf_weights(config), config, device=device, dtype=dtype)


def plain_packed(weights: dict[str, Tensor], ids: Tensor, types: Tensor, config: BertConfig = CONFIG) -> Tensor:
    parts = zip(ids.split(LENGTHS), types.split(LENGTHS), strict=True)
    return torch.cat([plain_bert(weights, i, t, config) for i, t in parts if len(i)])


# ---- what it computes


@dtypes
def test_accuracy_forward_and_backward(device, dtype):
    ids, types, cu_seqlens = (x.to(device) for x in batch())
    seed = random(TOTAL, CONFIG.hidden_size, seed="dout", dtype=dtype).to(device)
    rounded = {name: x.to(dtype) for name, x in hf_weights(pooler=False).items()}

    def plain(compute: torch.dtype) -> dict[str, Tensor]:
        weights = {name: x.to(device, compute).requires_grad_() for name, x in rounded.items()}
        out = plain_packed(weights, ids, types)
        out.backward(seed.to(compute))
        return {"out": out.detach(), **{name: x.grad for name, x in weights.items()}}

    exact, theirs = plain(torch.float64), plain(dtype)
    encoder = BertEncoder.from_huggingface(rounded, CONFIG, device=device)
    assert {x.dtype for x in encoder.parameters()} == {dtype}
    out = encoder(ids, cu_seqlens, types)
    out.backward(seed)
    assert_accurate("out", out.detach(), exact.pop("out"), theirs["out"])
    # Gradients come back under the names of Hugging Face through the loader itself.
    ours = BertEncoder.from_huggingface(exact, CONFIG)
    with_names = dict(BertEncoder.from_huggingface({n: theirs[n] for n in exact}, CONFIG).named_parameters())
    right = dict(ours.named_parameters())
    for name, parameter in encoder.named_parameters():
        assert_accurate(
            "d" + name, parameter.grad, right[name].detach().to(device), with_names[name].detach().to(device)
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, device):
    config = BertConfig(**SIZES, hidden_act=activation)
    ids, types, cu_seqlens = batch()
    exact = plain_packed({n: x.double() for n, x in hf_weights().items()}, ids, types, config)
    theirs = plain_packed(hf_weights(), ids, types, config)
    out = make(device, config=config)(ids.to(device), cu_seqlens.to(device), types.to(device))
    assert_accurate(activation, out.detach().cpu(), exact, theirs)


def test_float64_on_the_cpu_is_exact_to_its_last_digits():
    ids, types, cu_seqlens = batch()
    exact = plain_packed({n: x.double() for n, x in hf_weights().items()}, ids, types)
    torch.testing.assert_close(make(dtype=torch.float64)(ids, cu_seqlens, types), exact, rtol=0, atol=1e-13)


def test_token_types_are_zero_by_default():
    ids, types, cu_seqlens = batch()
    encoder = make()
    assert_same_bits("out", encoder(ids, cu_seqlens), encoder(ids, cu_seqlens, torch.zeros_like(types)))


@dtypes
def test_pooler(device, dtype):
    ids, types, cu_seqlens = (x.to(device) for x in batch())
    encoder = make(device, dtype)
    hidden = encoder(ids, cu_seqlens, types)
    pooled = encoder.pool(hidden, cu_seqlens)
    weight, bias = (hf_weights()[f"pooler.dense.{x}"].to(device, dtype) for x in ("weight", "bias"))
    expected = torch.zeros(len(LENGTHS), CONFIG.hidden_size, device=device, dtype=dtype)
    for i, start in enumerate(cu_seqlens[:-1].tolist()):
        if LENGTHS[i]:
            expected[i] = torch.tanh(weight @ hidden[start] + bias)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    pooled.float().square().sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in encoder.parameters())


# ---- the promises, as far as an encoder can make them


@dtypes
def test_slack_rows_hold_anything_and_come_back_as_zeros(device, dtype):
    ids, types, cu_seqlens = batch()
    encoder = make(device, dtype)

    def run(garbage: int) -> tuple[Tensor, dict[str, Tensor]]:
        tail = torch.full((9,), garbage)
        out = encoder(torch.cat([ids, tail]).to(device), cu_seqlens.to(device), torch.cat([types, tail]).to(device))
        seed = random(TOTAL + 9, CONFIG.hidden_size, seed="dout", dtype=dtype)
        seed[TOTAL:] = garbage if garbage else math.nan
        encoder.zero_grad()
        out.backward(seed.to(device))
        return out.detach(), {n: x.grad for n, x in encoder.named_parameters() if x.grad is not None}

    out, grads = run(0)
    assert not out[TOTAL:].any()
    for garbage in (-7, 10**6):
        other, other_grads = run(garbage)
        assert_same_bits("out", other, out)
        for name, grad in grads.items():
            assert_same_bits("d" + name, other_grads[name], grad)


@dtypes
def test_a_sequence_never_reaches_another(device, dtype):
    ids, _, cu_seqlens = batch()
    encoder = make(device, dtype)
    sick = 100  # a token that is in one sequence only; its embedding will be NaN
    clean = encoder(ids.to(device), cu_seqlens.to(device))
    with torch.no_grad():
        encoder.word_embeddings.weight[sick] = math.nan
    for i, n in enumerate(LENGTHS):
        if n == 0:
            continue
        start, end = cu_seqlens[i].item(), cu_seqlens[i + 1].item()
        with_sick = ids.clone()
        with_sick[start + n // 2] = sick
        out = encoder(with_sick.to(device), cu_seqlens.to(device))
        assert out[start:end].isnan().all()
        assert_same_bits("before", out[:start], clean[:start])
        assert_same_bits("after", out[end:], clean[end:])
        means = mean_pool(out, cu_seqlens.to(device))
        assert means.isnan().any(1).nonzero().flatten().tolist() == [i]


@dtypes
def test_the_same_rows_in_other_company_give_the_same_bits(device, dtype):
    encoder = make(device, dtype)
    ours = tokens(40, seed=9)
    others = [([13, 7], [30, 10]), ([20], [40]), ([1, 0, 19], []), ([0, 20], [1] * 40)]
    results = []
    for before, after in others:
        ids = torch.cat([tokens(sum(before), 1 + len(results)), ours, tokens(40, 2 + len(results))])
        cu_seqlens = boundaries([*before, 40, *after])
        hidden = encoder(ids.to(device), cu_seqlens.to(device))
        results.append((hidden[20:60], mean_pool(hidden, cu_seqlens.to(device))[len(before)]))
    for hidden, mean in results[1:]:
        assert_same_bits("hidden", hidden, results[0][0])
        assert_same_bits("mean", mean, results[0][1])


@dtypes
def test_alone_and_packed_differ_by_rounding_only(device, dtype):
    ids, types, cu_seqlens = batch()
    encoder = make(device, dtype)
    packed = encoder(ids.to(device), cu_seqlens.to(device), types.to(device))
    for i, n in enumerate(LENGTHS):
        rows = slice(cu_seqlens[i].item(), cu_seqlens[i + 1].item())
        alone = encoder(ids[rows].to(device), boundaries([n], device), types[rows].to(device))
        largest = packed.abs().max().item()
        limit = 16 * torch.finfo(dtype).eps * largest
        torch.testing.assert_close(packed[rows], alone, rtol=0, atol=limit)


@dtypes
def test_every_run_gives_the_same_bits(device, dtype):
    ids, types, cu_seqlens = (x.to(device) for x in batch())
    encoder = make(device, dtype)

    def run() -> dict[str, Tensor]:
        encoder.zero_grad()
        hidden = encoder(ids, cu_seqlens, types)
        (mean_pool(hidden, cu_seqlens) + encoder.pool(hidden, cu_seqlens)).float().square().sum().backward()
        return {"hidden": hidden.detach(), **{n: x.grad for n, x in encoder.named_parameters()}}

    first, second = run(), run()
    for name in first:
        assert_same_bits(name, second[name], first[name])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 3, 0], [1]], ids=str)
@pytest.mark.parametrize("slack", [0, 3])
def test_empty_things(lengths, slack, device):
    encoder, cu_seqlens = make(device), boundaries(lengths, device)
    ids = tokens(sum(lengths) + slack).to(device)
    hidden = encoder(ids, cu_seqlens)
    assert hidden.shape == (len(ids), CONFIG.hidden_size)
    for pooled in (mean_pool(hidden, cu_seqlens), encoder.pool(hidden, cu_seqlens)):
        assert pooled.shape == (len(lengths), CONFIG.hidden_size)
        assert pooled.isfinite().all()
        assert [bool(row.any()) for row in pooled] == [n > 0 for n in lengths]
    (hidden.sum() + mean_pool(hidden, cu_seqlens).sum()).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in encoder.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_recompiles_once(device, backend):
    encoder = make(device, config=BertConfig(**SIZES | {"num_hidden_layers": 1}))

    def embed(ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = encoder(ids, cu_seqlens)
        return mean_pool(hidden, cu_seqlens) + encoder.pool(hidden, cu_seqlens)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(embed, fullgraph=True, backend=counter)
    for lengths in ([5, 3, 8], [4, 0, 2, 9, 7], [6, 20], [31, 2, 2, 2, 2, 17, 70]):
        ids, _, cu_seqlens = (x.to(device) for x in batch(lengths))
        results = []
        for function in (embed, compiled):
            encoder.zero_grad()
            out = function(ids, cu_seqlens)
            out.square().sum().backward()
            results.append([out.detach(), *(x.grad for x in encoder.parameters())])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2, "recompiled more than once"


@pytest.mark.parametrize("dtype", [BF16, F16])
@torch.no_grad()
def test_autocast(device, dtype):
    ids, types, cu_seqlens = (x.to(device) for x in batch())
    encoder = make(device)
    with torch.autocast(device, dtype=dtype):
        out = encoder(ids, cu_seqlens, types)
    expected = encoder(ids, cu_seqlens, types)
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.gpu
@dtypes
@torch.inference_mode()
def test_no_copy_to_the_host_and_graphs_replay_with_other_lengths(dtype):
    encoder = make("cuda", dtype)

    def embed(ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = encoder(ids, cu_seqlens)
        return hidden, mean_pool(hidden, cu_seqlens), encoder.pool(hidden, cu_seqlens)

    ids, cu_seqlens = tokens(200).cuda(), boundaries([50, 0, 70, 1], "cuda")
    embed(ids, cu_seqlens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        embed(ids, cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, results = captured(lambda: embed(ids, cu_seqlens))
    for lengths in ([50, 0, 70, 1], [1, 80, 80, 39], [0, 0, 0, 7]):
        ids.copy_(tokens(200, seed=lengths[0]))
        cu_seqlens.copy_(boundaries(lengths))
        graph.replay()
        for name, got, expected in zip(("hidden", "mean", "pooled"), results, embed(ids, cu_seqlens), strict=True):
            assert_same_bits(f"{name} of {lengths}", got, expected)


# ---- the helpers


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 5))
def test_sequences_and_positions(lengths, slack):
    sequences, positions = sequences_and_positions(boundaries(lengths), sum(lengths) + slack)
    assert sequences.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)] + [len(lengths)] * slack
    assert positions.tolist() == [j for n in lengths for j in range(n)] + [0] * slack


@pytest.mark.parametrize("features", [384, 40, 1024])
@dtypes
def test_mean_pool_is_the_mean(device, dtype, features):
    lengths = [3, 0, 300, 1]
    hidden = (3 + random(sum(lengths), features, seed="hidden", dtype=F32)).to(device, dtype).requires_grad_()
    means = mean_pool(hidden, boundaries(lengths, device))
    seed = random(len(lengths), features, seed="dmeans", dtype=dtype).to(device)
    means.backward(seed)
    rows = hidden.detach().split(lengths)
    exact = torch.stack([x.double().mean(0) if len(x) else x.new_zeros(features).double() for x in rows])
    theirs = torch.stack([x.mean(0) if len(x) else x.new_zeros(features) for x in rows])
    assert_accurate("means", means.detach(), exact, theirs)
    grads = torch.cat([(seed[i].double() / max(n, 1)).expand(n, -1) for i, n in enumerate(lengths)])
    assert_accurate("dhidden", hidden.grad, grads, grads.to(dtype))


def test_mean_pool_takes_any_number_of_features_on_the_cpu():
    hidden = random(7, 67, seed="hidden", dtype=F32)
    torch.testing.assert_close(mean_pool(hidden, boundaries([7])), hidden.mean(0, keepdim=True))


def test_first_rows_of_a_last_sequence_that_is_empty():
    hidden = random(4, 3, seed="hidden", dtype=F32)
    got = first_rows(hidden, boundaries([0, 3, 1, 0]))
    assert_same_bits("first", got, torch.stack([torch.zeros(3), hidden[0], hidden[3], torch.zeros(3)]))


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 5, dtype=torch.int64)}, r"input_ids must be packed, \[total\].* got \(2, 5\)"),
        ({"input_ids": torch.zeros(5)}, r"input_ids .* got \(5,\) of torch.float32"),
        ({"token_type_ids": torch.zeros(4, dtype=torch.int64)}, r"token_type_ids must be \(100,\) .* got \(4,\)"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, r"cu_seqlens must be int32 .* got \(3,\) of torch.int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens must be int32 \[sequences \+ 1\], got \(0,\)"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens must be on cpu .* got meta"),
        ({"cu_seqlens": boundaries([50, 51])}, "cu_seqlens must .* end within the 100 rows, got .*101"),
        ({"cu_seqlens": boundaries([50, -1])}, "cu_seqlens must .* never decrease"),
        ({"cu_seqlens": boundaries([5, 81])}, "at most 80 tokens .* got one of 81"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"input_ids": tokens(100), "cu_seqlens": boundaries([40, 60]), "token_type_ids": torch.zeros(100).long()}
    encoder = make()
    encoder(**good)
    with pytest.raises(ValueError, match=f"^BertEncoder: .*{message}"):
        encoder(**good | change)


def test_pooling_without_a_pooler():
    encoder = BertEncoder.from_huggingface(hf_weights(pooler=False), CONFIG)
    with pytest.raises(ValueError, match="this encoder has no pooler"):
        encoder.pool(torch.zeros(1, CONFIG.hidden_size), boundaries([1]))


@pytest.mark.parametrize("function", [mean_pool, first_rows])
def test_pooling_names_what_is_wrong(function):
    with pytest.raises(ValueError, match=r"hidden must be \[total, features\].* got \(3,\)"):
        function(torch.zeros(3), boundaries([3]))
    with pytest.raises(ValueError, match=r"cu_seqlens must .* end within the 3 rows"):
        function(torch.zeros(3, 8), boundaries([4]))


# ---- weights


def assert_same_encoder(got: BertEncoder, expected: BertEncoder) -> None:
    assert got.config == expected.config
    expected = expected.state_dict()
    assert got.state_dict().keys() == expected.keys()
    for name, x in got.state_dict().items():
        assert_same_bits(name, x, expected[name])


def old_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {n.replace(*next((p for p in names.items() if p[0] in n), ("", ""))): x for n, x in weights.items()}
    return renamed | {"embeddings.position_ids": torch.arange(80)[None]}


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {f"bert.{name}": x for name, x in weights.items()},
        lambda weights: {f"bert.{name}": x for name, x in weights.items()} | {"cls.predictions.bias": torch.zeros(101)},
        old_names,
    ],
    ids=["prefix", "prefix-and-head", "old-names"],
)
def test_names_of_weights(change):
    weights = change(hf_weights())
    assert weights.keys() != hf_weights().keys()
    assert_same_encoder(BertEncoder.from_huggingface(weights, CONFIG), make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.layer.1.output.dense.bias"), "weights lack encoder.layer.1.output.dense.bias$"),
        (lambda w: w.pop("pooler.dense.bias"), "weights lack pooler.dense.bias$"),
        (lambda w: w.pop("embeddings.word_embeddings.weight"), "lack .*word_embeddings.* not of a BERT model"),
        (lambda w: w.update({"encoder.layer.3.output.dense.bias": torch.zeros(64)}), "not all BERT's: encoder.layer.3"),
        (
            lambda w: w.update({"encoder.layer.0.intermediate.dense.bias": torch.zeros(5)}),
            r"do not fit: encoder.layer.0.intermediate.dense.bias is \(5,\) and must be \(160,\)",
        ),
        (lambda w: [w.pop(n) for n in [*w] if "layer.2" in n], r"lack encoder.layer.2.* and 11 more"),
    ],
)
def test_wrong_weights_are_named(change, message):
    weights = hf_weights()
    change(weights)
    with pytest.raises(ValueError, match=message):
        BertEncoder.from_huggingface(weights, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute', got 'relative_key'"),
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"hidden_act": "mish"}, "hidden_act must be one of .*'gelu'.* got 'mish'"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 64 and 5"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BertEncoder.from_huggingface(hf_weights(), SIZES | change)


def test_state_dicts_need_a_config():
    with pytest.raises(ValueError, match="without a config: pass config="):
        BertEncoder.from_huggingface(hf_weights())


def test_folders_and_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        BertEncoder.from_huggingface(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "bert", "something_else": 7}))
    with pytest.raises(ValueError, match=r"hold, a model.safetensors; found \['config.json'\]"):
        BertEncoder.from_huggingface(tmp_path)
    safetensors.save_file({n: x.to(BF16) for n, x in hf_weights().items()}, tmp_path / "model.safetensors")
    expected = make(dtype=BF16)
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        assert_same_encoder(BertEncoder.from_huggingface(source), expected)
    assert not expected.training
    assert next(BertEncoder.from_huggingface(tmp_path, dtype=F32).parameters()).dtype == F32


def test_weights_are_copied_not_shared():
    weights = hf_weights()
    encoder = BertEncoder.from_huggingface(weights, CONFIG)
    weights["embeddings.LayerNorm.weight"].zero_()
    assert encoder.embeddings_norm.weight.any()


def test_random_weights_can_be_trained():
    torch.manual_seed(0)
    encoder = packseq.nn.BertEncoder(CONFIG)
    ids, _, cu_seqlens = batch()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    target = random(len(LENGTHS), CONFIG.hidden_size, seed="target", dtype=F32)
    losses = []
    for _ in range(10):
        loss = (mean_pool(encoder(ids, cu_seqlens), cu_seqlens) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---- Hugging Face's own


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@torch.no_grad()
def test_same_as_hugging_face(device, activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act=activation)).to(device).eval()
    ours = BertEncoder.from_huggingface(theirs)
    ids, types, cu_seqlens = (x.to(device) for x in batch())
    hidden = ours(ids, cu_seqlens, types)
    pooled = ours.pool(hidden, cu_seqlens)

    full = [i for i, n in enumerate(LENGTHS) if n]
    parts = {name: [x.split(LENGTHS)[i] for i in full] for name, x in (("input_ids", ids), ("token_type_ids", types))}
    parts["attention_mask"] = [torch.ones_like(x) for x in parts["input_ids"]]
    padded = {name: torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for name, x in parts.items()}
    expected = theirs(**padded)
    for row, i in enumerate(full):
        start, end = cu_seqlens[i].item(), cu_seqlens[i + 1].item()
        torch.testing.assert_close(hidden[start:end], expected.last_hidden_state[row, : LENGTHS[i]], rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled[i], expected.pooler_output[row], rtol=0, atol=1e-5)


def test_hugging_face_models_with_a_head_and_saved_ones(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    ours = BertEncoder.from_huggingface(model)
    assert ours.pooler is None
    model.save_pretrained(tmp_path)
    assert_same_encoder(BertEncoder.from_huggingface(tmp_path), ours)
    ids, _, cu_seqlens = batch([9])
    torch.testing.assert_close(ours(ids, cu_seqlens), model.bert(ids[None]).last_hidden_state[0], rtol=0, atol=1e-5)
