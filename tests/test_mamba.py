"""packseq.nn.Mamba and MambaLM against the block's formulas; decoding against recomputing; what a pack promises. How
weights come in, and Hugging Face's Mamba, are in test_mamba_weights.py.

The operators give a sequence the same bits in any pack; the matrix products around them are the BLAS library's. So, as
for BERT, it holds with the same rows, whatever the other sequences hold; alone and packed, results differ by rounding.
(What products sum over is a multiple of 32 here, for the reason that test_bert.py gives.)
"""

import math

import packseq
import pytest
import torch
import torch.nn.functional as F
from compare import assert_accurate, assert_same_bits
from mamba_models import (
    CONFIG,
    D_MODEL,
    LENGTHS,
    SIZES,
    TOTAL,
    batch,
    block_weights,
    dtypes,
    hidden_rows,
    make_block,
    make_lm,
    plain_block,
    tokens,
)
from operators import boundaries, captured, random
from packseq.nn import Mamba, MambaConfig, MambaLM, MambaStates
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

# ---- the block


@dtypes
def test_accuracy_forward_and_backward(device, dtype):
    rounded = {name: x.to(dtype) for name, x in block_weights().items()}
    hidden, seed = hidden_rows(dtype=dtype, device=device), random(TOTAL, D_MODEL, seed="dout", dtype=F32).to(device)

    def plain(compute: torch.dtype) -> dict[str, Tensor]:
        weights = {name: x.to(device, compute).requires_grad_() for name, x in rounded.items()}
        x = hidden.clone().to(compute).requires_grad_()
        out = torch.cat([plain_block(weights, rows) for rows in x.split(LENGTHS)])
        out.backward(seed.to(dtype).to(compute))
        return {"out": out.detach(), "hidden": x.grad, **{name: x.grad for name, x in weights.items()}}

    exact, theirs = plain(F64), plain(dtype)
    block = make_block(device, dtype)
    x = hidden.clone().requires_grad_()
    out = block(x, boundaries(LENGTHS, device))
    assert out.dtype == dtype
    out.backward(seed.to(dtype))
    got = {"out": out.detach(), "hidden": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    assert got.keys() == exact.keys()
    for name in exact:
        assert_accurate(name, got[name], exact[name], theirs[name])


def test_float64_on_the_cpu_is_exact_to_its_last_digits():
    hidden = hidden_rows(dtype=F64)
    weights = {name: x.double() for name, x in block_weights().items()}
    expected = torch.cat([plain_block(weights, rows) for rows in hidden.split(LENGTHS)])
    torch.testing.assert_close(make_block(dtype=F64)(hidden, boundaries(LENGTHS)), expected, rtol=0, atol=1e-13)


def test_one_sequence_needs_no_boundaries(device):
    block, hidden = make_block(device), hidden_rows(device=device)
    assert_same_bits("out", block(hidden), block(hidden, boundaries([TOTAL], device)))


def test_reverse_is_each_sequence_from_its_end(device):
    block, hidden = make_block(device), hidden_rows(device=device)
    cu_seqlens = boundaries(LENGTHS, device)

    def flipped(x: Tensor) -> Tensor:
        return torch.cat([rows.flip(0) for rows in x.split(LENGTHS)])

    out = block(hidden, cu_seqlens, reverse=True)
    torch.testing.assert_close(out, flipped(block(flipped(hidden), cu_seqlens)), rtol=0, atol=1e-5)


def test_parameters_are_those_of_mamba_ssm():
    torch.manual_seed(0)
    block = Mamba(96, dtype=BF16)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "in_proj.weight": (384, 96),
        "conv1d.weight": (192, 1, 4),
        "conv1d.bias": (192,),
        "x_proj.weight": (38, 192),
        "dt_proj.weight": (192, 6),
        "dt_proj.bias": (192,),
        "A_log": (192, 16),
        "D": (192,),
        "out_proj.weight": (96, 192),
    }
    wide = {name for name, p in block.named_parameters() if p.dtype == F32}
    assert wide == {"A_log", "D"} == {n for n, p in block.named_parameters() if hasattr(p, "_no_weight_decay")}
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17).expand(192, 16))
    assert (block.D == 1).all()
    dt = F.softplus(Mamba(2048).dt_proj.bias)
    assert 0.00099 < dt.min() < 0.0012
    assert 0.09 < dt.max() < 0.1001
    assert 0.009 < dt.log().mean().exp() < 0.011
    assert block.dt_proj.weight.abs().max() <= 6**-0.5
    assert (Mamba(64, dt_init="constant").dt_proj.weight == 4**-0.5).all()


# ---- states


def test_training_through_states_is_training_on_the_whole(device):
    """Two halves, the second from the first one's states, give the gradients of both at once."""
    ids = [tokens(20, 1), tokens(33, 2)]
    whole, cuts = make_lm(device), [7, 20]
    halves = make_lm(device)
    packed, cu_seqlens = (x.to(device) for x in packseq.packing.from_list(ids))
    logits = whole(packed, cu_seqlens)
    logits.square().sum().backward()
    states, outs = None, []
    for part in ([x[:cut] for x, cut in zip(ids, cuts, strict=True)], [x[c:] for x, c in zip(ids, cuts, strict=True)]):
        packed, cu_seqlens = (x.to(device) for x in packseq.packing.from_list(part))
        out, states = halves(packed, cu_seqlens, initial_states=states, return_final_states=True)
        outs.append(out.split([len(x) for x in part]))
    sum(out.square().sum() for half in outs for out in half).backward()
    together = torch.cat([torch.cat(pair) for pair in zip(*outs, strict=True)])
    torch.testing.assert_close(together, logits, rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(whole.named_parameters(), halves.parameters(), strict=True):
        limit = 1e-5 * p.grad.abs().max().item()
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=limit, msg=lambda text, n=name: f"{n}: {text}")


@dtypes
def test_steps_are_the_prefill(device, dtype):
    """Token by token, and a few at once, from a pool whose slots lie in another order."""
    model = make_lm(device, dtype)
    ids = [tokens(n, n) for n in (12, 9, 15)]
    packed, cu_seqlens = (x.to(device) for x in packseq.packing.from_list(ids))
    expected, final = model(packed, cu_seqlens, return_final_states=True)
    limit = {F32: 1e-5, BF16: 0.1, F16: 0.02}[dtype] * expected.abs().max().item()
    slots = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    pools = {"single": model.allocate_states(5), "few": model.allocate_states(5)}
    for pool in pools["few"]:
        pool.scan[3].fill_(7)  # another sequence's
    for t in range(15):
        # A sequence that has ended is skipped.
        now = torch.tensor([int(x[t]) if t < len(x) else 0 for x in ids], device=device)
        used = torch.tensor([t < len(x) for x in ids], device=device)
        logits = model.step(now, pools["single"], indices=slots.masked_fill(~used, -1))
        for i, start in enumerate(cu_seqlens[:-1].tolist()):
            if used[i]:
                torch.testing.assert_close(logits[i], expected[start + t], rtol=0, atol=limit)
    for first in range(0, 15, 4):
        parts = [x[first : first + 4] for x in ids]
        some, cuts = (x.to(device) for x in packseq.packing.from_list(parts))
        logits = model.step(some, pools["few"], cuts, indices=slots).split([len(x) for x in parts])
        for i, start in enumerate(cu_seqlens[:-1].tolist()):
            rows = expected[start + first : start + first + len(parts[i])]
            torch.testing.assert_close(logits[i], rows, rtol=0, atol=limit)
    for layer, states in enumerate(final):
        for name, pool in pools.items():
            for got, last in zip(pool[layer], states, strict=True):
                atol = (1e-5 if dtype == F32 else 16 * torch.finfo(dtype).eps) * last.abs().max().item()
                torch.testing.assert_close(got[slots.long()], last, rtol=0, atol=atol, msg=lambda m, n=name: f"{n} {m}")
    assert (pools["few"][0].scan[3] == 7).all()
    assert not pools["single"][0].scan[1].any()


def test_states_of_a_prefill_are_a_pool(device):
    model = make_lm(device)
    ids, cu_seqlens = batch(device=device)
    _, states = model(ids, cu_seqlens, return_final_states=True)
    model.step(tokens(len(LENGTHS)).to(device), states)
    assert states[0].conv.shape == (len(LENGTHS), 2 * D_MODEL, 3)
    assert isinstance(states[0], MambaStates)


# ---- generation


def recomputed(model: MambaLM, prompt: Tensor, count: int) -> Tensor:
    ids = prompt
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[-1:].argmax(-1).to(ids.dtype)])
    return ids[len(prompt) :]


@torch.no_grad()
def test_generation_with_states_is_recomputing(device):
    model = make_lm(device)
    prompts = [tokens(n, n).to(device) for n in (1, 30, 3, 17)]
    generated = model.generate(prompts, 12)
    assert len(torch.cat(generated).unique()) > 5
    for prompt, added in zip(prompts, generated, strict=True):
        assert_same_bits("added", added, recomputed(model, prompt, 12))
        assert_same_bits("alone", model.generate([prompt], 12)[0], added)


@torch.no_grad()
def test_generation_stops(device):
    model = make_lm(device)
    prompts = [tokens(n, n).to(device) for n in (1, 30, 3, 17)]
    free = model.generate(prompts, 12)
    stop = int(free[1][4])
    for added, whole in zip(model.generate(prompts, 12, stop_token=stop), free, strict=True):
        ends = (whole == stop).nonzero()
        assert_same_bits("added", added, whole[: int(ends[0]) + 1] if len(ends) else whole)
    assert [len(x) for x in model.generate(prompts, 0)] == [0] * 4
    assert model.generate([], 5) == []
    [one] = model.generate([prompts[1].int()], 100, stop_token=stop)
    assert one.dtype == torch.int32
    assert one[-1] == stop


@torch.no_grad()
def test_drawing(device):
    model = make_lm(device)
    prompts = [tokens(4).to(device)] * 200

    def draw(**options) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return torch.stack(model.generate(prompts, 2, generator=generator, **options))

    first = draw(temperature=20.0)
    assert torch.equal(first, draw(temperature=20.0))
    assert len(first[:, 0].unique()) > 10
    top = model(prompts[0])[-1].topk(3).indices
    assert set(draw(temperature=50.0, top_k=3)[:, 0].tolist()) == set(top.tolist())
    assert_same_bits("greedy", draw(temperature=1e-3), torch.stack(model.generate(prompts, 2)))


# ---- training


def test_random_weights_can_be_trained():
    torch.manual_seed(0)
    model = MambaLM(CONFIG)
    assert not model.layers[0].mixer.in_proj.bias.any()
    ids, cu_seqlens = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(ids, cu_seqlens), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---- what a pack promises


@dtypes
@torch.no_grad()
def test_a_sequence_never_reaches_another(device, dtype):
    ids, cu_seqlens = batch(device=device)
    model = make_lm(device, dtype)
    sick = CONFIG.vocab_size - 1  # a token that is in one sequence only; its embedding will be NaN
    hidden = model.hidden_states(ids, cu_seqlens)
    model.embedding.weight[sick] = math.nan
    for i, n in enumerate(LENGTHS):
        if n == 0:
            continue
        start, end = cu_seqlens[i].item(), cu_seqlens[i + 1].item()
        with_sick = ids.clone()
        with_sick[start + n // 2] = sick
        out = model.hidden_states(with_sick, cu_seqlens)
        assert out[start + n // 2 : end].isnan().all()
        assert_same_bits("before", out[: start + n // 2], hidden[: start + n // 2])
        assert_same_bits("after", out[end:], hidden[end:])


@dtypes
def test_slack_rows_hold_anything_and_come_back_as_zeros(device, dtype):
    ids, cu_seqlens = batch(device=device)
    model, block = make_lm(device, dtype), make_block(device, dtype)

    def run(garbage: int, value: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tail = torch.full((9,), garbage, device=device)
        last = model.hidden_states(torch.cat([ids, tail]), cu_seqlens)
        hidden = torch.cat([hidden_rows(dtype=dtype, device=device), torch.full((9, D_MODEL), value, device=device)])
        out = block(hidden.to(dtype), cu_seqlens)
        model.zero_grad()
        block.zero_grad()
        for x in (last, out):
            seed = random(*x.shape, seed="dout", dtype=F32).to(device, dtype)
            seed[TOTAL:] = value
            x.backward(seed)
        named = [*model.named_parameters(), *block.named_parameters()]
        return last.detach(), out.detach(), {name: p.grad for name, p in named}

    last, out, grads = run(0, 1.0)
    assert not last[TOTAL:].any()
    assert not out[TOTAL:].any()
    assert not model.logits(last)[TOTAL:].any()
    for garbage in (-7, 10**6):
        other_last, other_out, other_grads = run(garbage, math.nan)
        assert_same_bits("hidden_states", other_last, last)
        assert_same_bits("out", other_out, out)
        for name, grad in grads.items():
            assert_same_bits("d" + name, other_grads[name], grad)


@dtypes
@torch.no_grad()
def test_alone_and_packed_differ_by_rounding_only(device, dtype):
    ids, cu_seqlens = batch(device=device)
    model = make_lm(device, dtype)
    packed = model(ids, cu_seqlens)
    for i, n in enumerate(LENGTHS):
        rows = slice(cu_seqlens[i].item(), cu_seqlens[i + 1].item())
        alone = model(ids[rows], boundaries([n], device))
        limit = 8 * torch.finfo(dtype).eps * packed.abs().max().item()
        torch.testing.assert_close(packed[rows], alone, rtol=0, atol=limit)


@dtypes
def test_every_run_gives_the_same_bits(device, dtype):
    ids, cu_seqlens = batch(device=device)
    model = make_lm(device, dtype)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(ids, cu_seqlens)
        logits.float().square().sum().backward()
        return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    first, second = run(), run()
    for name in first:
        assert_same_bits(name, second[name], first[name])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 3, 0], [1]], ids=str)
@pytest.mark.parametrize("slack", [0, 3])
def test_empty_things(lengths, slack, device):
    model, cu_seqlens = make_lm(device), boundaries(lengths, device)
    ids = tokens(sum(lengths) + slack).to(device)
    logits, states = model(ids, cu_seqlens, return_final_states=True)
    assert logits.shape == (len(ids), CONFIG.vocab_size)
    assert all(len(x) == len(lengths) for layer in states for x in layer)
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_compiles_whole_and_recompiles_once(device):
    model = MambaLM(MambaConfig(**SIZES | {"num_hidden_layers": 1})).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in ([5, 3, 8], [4, 0, 2, 9, 7], [31, 2, 2, 2, 2, 17, 70]):
        ids, cu_seqlens = batch(lengths, device)
        results = []
        for function in (model, compiled):
            model.zero_grad()
            out = function(ids, cu_seqlens)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in model.parameters())])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2, "recompiled more than once"


@pytest.mark.parametrize("dtype", [BF16, F16])
@torch.no_grad()
def test_autocast(device, dtype):
    ids, cu_seqlens = batch(device=device)
    model = make_lm(device)
    with torch.autocast(device, dtype=dtype):
        out, states = model(ids, cu_seqlens, return_final_states=True)
        pool = model.allocate_states(len(LENGTHS), dtype)
        stepped = model.step(ids[: len(LENGTHS)], pool)
    expected = model(ids, cu_seqlens)
    assert {x.dtype for layer in (*states, *pool) for x in layer} == {dtype, F32}
    assert stepped.isfinite().all()
    limit = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=limit)


@pytest.mark.gpu
@dtypes
@torch.no_grad()
def test_no_copy_to_the_host_and_graphs_replay_with_other_lengths(dtype):
    model = make_lm("cuda", dtype)
    ids, cu_seqlens = tokens(200).cuda(), boundaries([50, 0, 70, 1], "cuda")
    pool, slots = model.allocate_states(6), torch.tensor([3, 1, -1, 5], dtype=torch.int32, device="cuda")
    now = tokens(4).cuda()

    def work() -> tuple[Tensor, Tensor]:
        return model(ids, cu_seqlens), model.step(now, pool, indices=slots)

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, results = captured(work)
    for lengths in ([50, 0, 70, 1], [1, 80, 80, 39], [0, 0, 0, 7]):
        ids.copy_(tokens(200, seed=lengths[0]))
        now.copy_(tokens(4, seed=lengths[0]))
        cu_seqlens.copy_(boundaries(lengths))
        slots.copy_(slots.roll(1))
        before = [MambaStates(*(x.clone() for x in states)) for states in pool]
        graph.replay()
        got = [x.clone() for x in (*results, *(x for states in pool for x in states))]
        for states, old in zip(pool, before, strict=True):
            for x, y in zip(states, old, strict=True):
                x.copy_(y)
        expected = [*work(), *(x for states in pool for x in states)]
        for i, (x, y) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(f"{i} of {lengths}", x, y)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 5, dtype=torch.int64)}, r"input_ids must be packed, \[total\].* got \(2, 5\)"),
        ({"input_ids": torch.zeros(5)}, r"input_ids .* got \(5,\) of torch.float32"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, r"cu_seqlens must be int32 .* got \(3,\) of torch.int64"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, "cu_seqlens must be on cpu .* got meta"),
        ({"cu_seqlens": boundaries([50, 51])}, "cu_seqlens must .* end within the 100 rows, got .*101"),
    ],
)
def test_bad_input_is_named(change, message):
    model, good = make_lm(), {"input_ids": tokens(100), "cu_seqlens": boundaries([40, 60])}
    model(**good)
    with pytest.raises(ValueError, match=f"^MambaLM: {message}"):
        model(**good | change)


def test_bad_arguments_of_a_block_are_named():
    block = make_block()
    for bad in (torch.zeros(2, 3, D_MODEL), torch.zeros(3, 5), torch.zeros(3, D_MODEL, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^Mamba: hidden must be packed, \[total, 32\], floating point, got"):
            block(bad)
    for message, options in {
        "dt_init must be": {"dt_init": "zeros"},
        "d_state must be 1 to 256, got 257": {"d_state": 257},
        "d_conv must be 2 to 8, got 1": {"d_conv": 1},
    }.items():
        with pytest.raises(ValueError, match=f"^Mamba: {message}"):
            Mamba(8, **options)
    with pytest.raises(ValueError, match=r"^MambaLM.generate: prompts must be .* got \(0,\) at position 1"):
        make_lm().generate([tokens(3), tokens(0)], 4)
    for options in ({"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match=r"^MambaLM.generate: temperature must be at least 0"):
            make_lm().generate([tokens(3)], 4, **options)
