"""Attention over ranks is attention: outputs and every gradient, on any batch, however it is spread."""

import re

import packseq
import pytest
import torch
from cases import MASKS
from compare import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import boundaries, statistics
from packseq.ring import ring_attention, ring_causal_conv1d, ring_long_conv, ring_selective_scan, shard
from ranks import WORLDS, message_of, ranks
from test_attention_parts import options_of
from torch import Tensor

SLACK = 2


def draws(lengths: list[int], dtype: torch.dtype, shape: tuple, device: str) -> list[Tensor]:
    """q, k, v, the gradients of out and lse, sinks."""
    heads, kv_heads, dim, dim_v = shape
    generator = torch.Generator().manual_seed(5)
    rows, kind = sum(lengths), statistics(dtype)
    sizes = [(rows, heads, dim), (rows, kv_heads, dim), (rows, kv_heads, dim_v), (rows, heads, dim_v), (rows, heads)]
    drawn = [torch.randn(size, generator=generator, dtype=kind).to(device) for size in [*sizes, (heads,)]]
    return [x.to(dtype) if i < 4 else x for i, x in enumerate(drawn)]


def with_gradients(call, q, k, v, dout, dlse, sinks) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    out, lse = call(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, dlse))]


def options_on(mask: dict, shape: tuple, device: str, dtype: torch.dtype, sinks: Tensor) -> tuple[dict, Tensor | None]:
    return options_of(mask, shape[0], device, dtype), sinks if mask.get("sinks") else None


def on_one(lengths: list[int], dtype: torch.dtype, shape: tuple, mask: dict, device: str) -> list[Tensor]:
    *tensors, sinks = draws(lengths, dtype, shape, device)
    options, sinks = options_on(mask, shape, device, dtype, sinks)

    def call(q, k, v, sinks=None):
        return packseq.attention(*(q, k, v, boundaries(lengths, device)), **options, sinks=sinks, return_lse=True)

    return [x.cpu() for x in with_gradients(call, *tensors, sinks)]


def on_rank(group, rank, lengths, dtype, shape, mask, spread, device) -> list[Tensor]:
    sharding = shard(boundaries(lengths, "cpu"), group.size(), **spread)
    *tensors, sinks = draws(lengths, dtype, shape, device)
    options, sinks = options_on(mask, shape, device, dtype, sinks)

    def rows(x: Tensor) -> Tensor:
        """Further apart than they are long, as a projection's parts are."""
        mine = torch.cat([sharding.shard(x, rank), x.new_full((SLACK, *x.shape[1:]), torch.nan)])
        return torch.stack([mine, mine], 1)[:, 0]

    def call(q, k, v, sinks=None):
        return ring_attention(q, k, v, sharding, group, **options, sinks=sinks, return_lse=True)

    return [x.cpu() for x in with_gradients(call, *(rows(x) for x in tensors), sinks)]


def on_ranks(world: int, lengths, dtype, shape, mask, spread, device="cpu") -> list[Tensor]:
    """Of the whole batch again; slack rows are zeros, and sinks' gradients are added up."""
    answers = ranks(device).run(on_rank, world, lengths, dtype, shape, mask, spread, device)
    sharding = shard(boundaries(lengths, "cpu"), world, **spread)
    results = []
    for i, parts in enumerate(zip(*answers, strict=True)):
        if i == 5:
            results.append(torch.stack(parts).sum(0))
            continue
        for part, size in zip(parts, sharding.sizes, strict=True):
            assert len(part) == size + SLACK
            assert (part[size:] == 0).all()
        results.append(sharding.unshard(parts))
    return results


NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def check(world, lengths, dtype, shape, mask, spread, device="cpu") -> None:
    """At most 1.2 times the error of one call, and an ulp of the largest value."""
    got = on_ranks(world, lengths, dtype, shape, mask, spread, device)
    one = on_one(lengths, dtype, shape, mask, device)
    *tensors, sinks = draws(lengths, dtype, shape, "cpu")
    options, sinks = options_on(mask, shape, "cpu", torch.float64, sinks)

    def call(q, k, v, sinks=None):
        return packseq.attention(q, k, v, boundaries(lengths, "cpu"), **options, sinks=sinks, return_lse=True)

    wide = [None if x is None else x.double() for x in (*tensors, sinks)]
    for name, x, y, exact in zip(NAMES, got, one, with_gradients(call, *wide), strict=False):
        assert x.dtype == y.dtype, name
        finite = exact.isfinite()
        assert torch.equal(x.isfinite(), finite), name
        ours, theirs = (torch.where(finite, (z.double() - exact).abs(), 0) for z in (x, y))
        if x.numel() == 0:
            continue
        most = torch.where(finite, exact.abs(), 0).max().item()
        ulps = 16 if dtype == torch.float64 else 2
        # The few sums that dsinks is are each one draw of what half types' rounding makes of it.
        factor = 3 if name == "dsinks" and dtype in (torch.float16, torch.bfloat16) else 1.2
        limit = factor * theirs.max().item() + ulps * torch.finfo(x.dtype).eps * most
        # Differences of like terms.
        limit += 128 * torch.finfo(y.dtype if dtype == torch.float64 else torch.float32).eps
        assert ours.max().item() <= limit, f"{name}: {ours.max().item():.3e} > {limit:.3e}"


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), max_size=5)
SPREADS = [{"layout": "zigzag"}, {"layout": "contiguous"}]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WORLDS), LENGTHS, st.sampled_from(list(MASKS)), st.sampled_from(SPREADS), st.integers(0, 10))
def test_any_batch_any_mask(world, lengths, mask, spread, ulysses):
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    spread = {**spread, "ulysses": divisors[ulysses % len(divisors)]}
    check(world, lengths, torch.float32, (4, 2, 16, 8), MASKS[mask], spread)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_every_mask_over_four_ranks(mask, layout):
    check(4, [130, 0, 7, 61, 1], torch.float32, (4, 2, 16, 16), MASKS[mask], {"layout": layout})


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (3, 3), (8, 2), (6, 2), (5, 5), (12, 4), (6, 3)], ids=str)
@pytest.mark.parametrize("spread", [(2, 2), (4, 4), (4, 2), (8, 4), (3, 3), (8, 8)], ids=str)
def test_heads_that_do_not_divide_the_ranks(heads, spread):
    world, ulysses = spread
    mask = {"causal": True, "alibi": True, "sinks": True}
    check(world, [40, 3, 0, 21], torch.float32, (*heads, 8, 8), mask, {"ulysses": ulysses})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("world", [2, 8])
def test_error_does_not_grow_with_ranks(dtype, world):
    check(world, [700, 90, 333], dtype, (4, 2, 64, 64), MASKS["causal"], {"layout": "zigzag"})


@pytest.mark.parametrize("world", [2, 4])
def test_sequences_spread_over_some_ranks(world):
    spans = [(0, 1), (world // 2, world // 2), (0, world), (world - 1, 1)]
    check(world, [30, 50, 77, 1], torch.float32, (2, 2, 16, 16), MASKS["causal"], {"spans": spans})


def each_its_own(world: int) -> dict:
    """Of five sequences: the ranks each is spread over, and how many of them share a shard; some ranks have several."""
    half = world // 2
    spans = [(0, world), (half, half), (0, half), (0, world), (world - 2, 2)]
    return {"spans": spans, "ulysses": [2, 1, half, 1, 2]}


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "everything"])
def test_sequences_with_their_own_ranks_and_shards(world, heads, mask):
    check(world, [70, 50, 77, 3, 20], torch.float32, (*heads, 16, 8), MASKS[mask], each_its_own(world))


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mask", ["causal", "everything", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ulysses", [1, 2, "own"])
def test_over_nccl(world, mask, dtype, ulysses):
    spread = each_its_own(world) if ulysses == "own" else {"ulysses": ulysses}
    check(world, [700, 0, 91, 333, 1], dtype, (8, 2, 64, 64), MASKS[mask], spread, "cuda")


@pytest.mark.parametrize(
    "spread", [{"layout": "zigzag"}, {"layout": "contiguous"}, {"ulysses": 2}, {"ulysses": [1, 4, 2]}], ids=str
)
def test_the_same_bits_every_time(spread):
    arguments = 4, [130, 9, 61], torch.bfloat16, (4, 2, 16, 16), MASKS["everything"], spread
    for name, x, y in zip(NAMES, on_ranks(*arguments), on_ranks(*arguments), strict=True):
        assert_same_bits(name, x, y)


def isolated(group, rank, lengths, poisoned, spread) -> list[Tensor]:
    sharding = shard(boundaries(lengths, "cpu"), group.size(), **spread)
    q, k, v, dout, dlse, _ = draws(lengths, torch.float32, (2, 2, 16, 16), "cpu")
    begin, end = boundaries(lengths, "cpu")[poisoned : poisoned + 2].tolist()
    for x in (q, k, v, dout):
        x[begin:end] = torch.nan
    tensors = [sharding.shard(x, rank) for x in (q, k, v, dout, dlse)]
    results = with_gradients(
        lambda q, k, v: ring_attention(q, k, v, sharding, group, causal=True, return_lse=True), *tensors, None
    )
    return results


def test_nan_stays_in_its_sequence():
    lengths = [40, 33, 21]
    clean = on_ranks(4, lengths, torch.float32, (2, 2, 16, 16), MASKS["causal"], {})
    sharding = shard(boundaries(lengths, "cpu"), 4)
    parts = zip(*ranks().run(isolated, 4, lengths, 1, {}), strict=True)
    keep = torch.ones(94, dtype=torch.bool)
    keep[40:73] = False
    for name, x, y in zip(NAMES, (sharding.unshard(x) for x in parts), clean, strict=False):
        assert x[~keep].isnan().all()
        assert_same_bits(name, x[keep], y[keep])


def skipped(group, rank) -> list[int]:
    from packseq.ring.attention_plan import Mask, attention_plan

    sharding = shard([0, 100, 200, 300, 400], 4, "contiguous")
    plan = attention_plan(sharding, Mask(True, -1, -1, 0, False), rank, torch.device("cpu"))
    return [step.shift for step in plan if step]


def test_steps_that_have_nothing_to_do_are_left_out():
    assert ranks().run(skipped, 4) == [[0]] * 4  # no sequence straddles ranks


def compiled(group, rank: int, mixer: str) -> list[float]:
    """How far a compiled call is from the call, over batches of several lengths."""

    def call(q, k, v, sharding):
        if mixer == "attention":
            return ring_attention(q, k, v, sharding, group, causal=True)
        if mixer == "long_conv":
            x = torch.complex(-torch.ones(16, 3), torch.arange(48.0).view(16, 3))
            taps = 2 * (x[..., None] * torch.arange(100)).exp().real.sum(1)
            modes = x, torch.ones_like(x), torch.ones_like(x)
            out = ring_long_conv(q.flatten(1), taps, modes, sharding, group, pre_gate=k.flatten(1), gate=v.flatten(1))
            return out.view(q.shape)
        u, delta, z, B = q.flatten(1), k.flatten(1), v.flatten(1), q[:, :1, :4]
        x = ring_causal_conv1d(u, u.new_ones(16, 3), None, sharding, group, activation="silu")
        A = -torch.ones(16, 4)
        return ring_selective_scan(x, delta, A, B, B, sharding, group, z=z, delta_softplus=True).view(q.shape)

    whole = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    distances = []
    for lengths in ([40, 7, 21], [9, 0, 33], [64]):
        sharding = shard(boundaries(lengths, "cpu"), group.size())
        tensors = [sharding.shard(x, rank) for x in draws(lengths, torch.float32, (2, 2, 8, 8), "cpu")[:4]]
        results = []
        for function in (call, whole):
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            out = function(*leaves, sharding)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, tensors[3])])
        distances += [float((x - y).abs().max()) for x, y in zip(*results, strict=True)]
    torch._dynamo.reset()
    return distances


@pytest.mark.parametrize("mixer", ["attention", "scan", "long_conv"])
def test_compiles_whole_with_lengths_that_change(mixer):
    most = 1e-5 if mixer == "long_conv" else 0  # compiled, it goes over all pieces at once
    for distances in ranks().run(compiled, 2, mixer):
        assert len(distances) == 12
        assert max(distances) <= most


BAD = {
    "rows": ({"q": lambda x: x[:1]}, r"q must be \[rows, heads, dim\] with at least this rank's"),
    "group": ({"sharding": lambda x: shard(x.cu_seqlens, 3)}, "group must have the sharding's 3 ranks, got 2"),
    "alibi": ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes has no gradient"),
    "window": ({"window": 3}, "window must be"),
}


def bad_input(group, rank, name) -> str:
    changes, _ = BAD[name]
    sharding = shard([0, 10, 17], group.size())
    arguments = {n: torch.zeros(sharding.sizes[rank], 2, 8) for n in "qkv"} | {"sharding": sharding}
    ring_attention(**arguments, group=group)
    arguments |= {n: x(arguments[n]) if callable(x) else x for n, x in changes.items()}
    return message_of(ring_attention, **arguments, group=group)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    for message in ranks().run(bad_input, 2, name):
        assert re.search(BAD[name][1], message), message
