"""Scans and convolutions over ranks are those on one: outputs, final states and every gradient, on any batch."""

import itertools
from collections.abc import Callable

import packseq
import pytest
import torch
from compare import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import boundaries
from packseq.ring import carry, ring_causal_conv1d, ring_long_conv, ring_selective_scan, shard
from ranks import WORLDS, ranks
from scan_cases import EVERYTHING, MAMBA, ConvCase, ScanCase
from scan_inputs import conv_inputs, scan_inputs
from tensors import Draw, Tensors, with_gradients
from torch import Tensor

SLACK = 2
OF_SEQUENCES = {"initial_states", "final_states"}


class LongConvCase(ConvCase):
    """Of `width` modes; bias is the skip, silu the gates."""


def long_conv_inputs(case: LongConvCase, device: str) -> tuple[Tensors, Tensors, dict]:
    draw, n = Draw(case, device), len(case.lengths)
    wide = draw.wide
    rows, modes = (sum(case.lengths), case.channels), (case.channels, case.width)
    x = torch.complex(-0.3 * draw(*modes, dtype=wide).abs() - 0.01, draw(*modes, dtype=wide))
    tensors = {"u": draw(*rows, dtype=case.dtype), "x": x}
    tensors |= {name: draw(*modes, dtype=wide.to_complex()) for name in "BC"}
    if case.bias:
        tensors["D"] = draw(case.channels, dtype=wide)
    if case.silu:
        tensors |= {name: draw(*rows, dtype=case.dtype) for name in ("pre_gate", "gate")}
    if case.initial_states:
        tensors["initial_states"] = draw(n, *modes, dtype=wide.to_complex())
    gradients = {"out": draw(*rows, dtype=case.dtype), "final_states": draw(n, *modes, dtype=wide.to_complex())}
    return tensors, gradients, {"reverse": case.reverse}


def long_conv_of(u: Tensor, x: Tensor, B: Tensor, C: Tensor, where: tuple, options: dict) -> tuple[Tensor, Tensor]:
    """The filter is made of the modes, so that their gradients are all there is to compare."""
    k = 2 * ((C * B)[..., None] * (x[..., None] * torch.arange(u.shape[0] + 300, device=u.device)).exp()).real.sum(1)
    if len(where) == 1:
        return packseq.long_conv(u, k, *where, modes=(x, B, C), return_final_states=True, **options)
    return ring_long_conv(u, k, (x, B, C), *where, return_final_states=True, **options)


def call_of(case, where: tuple, options: dict) -> Callable:
    """Of boundaries on one rank, or of a sharding and a group."""

    def call(**tensors: Tensor):
        if isinstance(case, LongConvCase):
            positional = [tensors.pop(name) for name in ("u", "x", "B", "C")]
            return long_conv_of(*positional, where, options | tensors)
        if isinstance(case, ScanCase):
            function = packseq.selective_scan if len(where) == 1 else ring_selective_scan
            names = ("u", "delta", "A", "B", "C")
        else:
            function = packseq.causal_conv1d if len(where) == 1 else ring_causal_conv1d
            names = ("x", "weight", "bias")
        positional = [tensors.pop(name, None) for name in names]
        return function(*positional, *where, return_final_states=True, **tensors, **options)

    return call


def inputs_of(case, device: str) -> tuple[Tensors, Tensors, dict]:
    make = {ScanCase: scan_inputs, ConvCase: conv_inputs, LongConvCase: long_conv_inputs}[type(case)]
    return make(case, device)


def is_per_token(name: str, x: Tensor, case) -> bool:
    if name in ("u", "delta", "z", "x", "out", "pre_gate", "gate"):
        return not (isinstance(case, LongConvCase) and name == "x")
    return name in ("B", "C") and x.dim() == 3


def on_one(case, device: str) -> Tensors:
    tensors, gradients, options = inputs_of(case, device)
    return with_gradients(call_of(case, (boundaries(case.lengths, device),), options), tensors, gradients)


def on_rank(group, rank: int, case, spread: dict, device: str, poisoned: int | None = None) -> Tensors:
    """What this rank's rows give; with NaN in one sequence, if asked for."""
    sharding = shard(boundaries(case.lengths, "cpu"), group.size(), **spread)
    tensors, gradients, options = inputs_of(case, device)
    if poisoned is not None:
        begin, end = sharding.cu_seqlens[poisoned : poisoned + 2].tolist()
        for name, x in (tensors | gradients).items():
            if is_per_token(name, x, case):
                x[begin:end] = torch.nan

    def mine(name: str, x: Tensor) -> Tensor:
        if name == "final_states":  # its gradients on all ranks add up: every sequence's comes from one of them
            keep = torch.arange(len(x), device=x.device) % group.size() == rank
            return x * keep.view(-1, 1, 1)
        if not is_per_token(name, x, case):
            return x
        return torch.cat([sharding.shard(x, rank), x.new_full((SLACK, *x.shape[1:]), torch.nan)])

    tensors, gradients = ({name: mine(name, x) for name, x in xs.items()} for xs in (tensors, gradients))
    results = with_gradients(call_of(case, (sharding, group), options), tensors, gradients)
    return {name: x.cpu() for name, x in results.items()}


def on_ranks(case, world: int, spread: dict, device: str = "cpu") -> Tensors:
    answers = ranks(device).run(on_rank, world, case, spread, device)
    sharding = shard(boundaries(case.lengths, "cpu"), world, **spread)
    tensors, _, _ = inputs_of(case, "cpu")
    results = {}
    for name in answers[0]:
        parts = [answer[name] for answer in answers]
        source = name if name == "out" else name.removeprefix("d")
        if name == "final_states":
            for part in parts[1:]:
                assert_same_bits(name, part, parts[0])
            results[name] = parts[0]
        elif name == "out" or is_per_token(source, tensors[source], case):
            assert all((part[-SLACK:] == 0).all() for part in parts), name
            results[name] = sharding.unshard(parts)
        else:
            results[name] = torch.stack(parts).sum(0)
    return results


def check(case, world: int, spread: dict, device: str = "cpu") -> None:
    """As near to float64 as on one rank, within twice its error and some ulps of the largest value."""
    got, one = on_ranks(case, world, spread, device), on_one(case, device)
    tensors, gradients, options = inputs_of(case, "cpu")
    wide = [
        {n: x.to(torch.complex128 if x.is_complex() else torch.float64) for n, x in xs.items()}
        for xs in (tensors, gradients)
    ]
    exact = with_gradients(call_of(case, (boundaries(case.lengths),), options), *wide)
    for name, x in got.items():
        assert (x.dtype, x.shape) == (one[name].dtype, one[name].shape), name
        if x.numel() == 0:
            continue
        ours, theirs = ((z.cpu().to(exact[name].dtype) - exact[name]).abs().max().item() for z in (x, one[name]))
        ulps = 64 if case.dtype == torch.float64 else 16
        limit = 2 * theirs + ulps * torch.finfo(x.dtype).eps * exact[name].abs().max().item()
        assert ours <= limit, f"{name}: {ours:.3e} > {limit:.3e}, on one {theirs:.3e}"


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), max_size=5).map(tuple)
SPREADS = st.sampled_from(
    [
        (1, {}),
        (2, {}),
        (3, {"layout": "contiguous"}),
        (4, {}),
        (4, {"ulysses": 2}),
        (8, {"layout": "contiguous"}),
        (8, {}),
    ]
)
BOOLEANS = st.booleans()


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SPREADS, BOOLEANS, BOOLEANS, BOOLEANS, st.sampled_from(["", "B", "BC"]))
def test_scan_of_any_batch(lengths, spread, complex, initial_states, reverse, constant):
    options = MAMBA | {"complex": complex, "initial_states": initial_states, "reverse": reverse, "constant": constant}
    check(ScanCase("ring", lengths, 3, torch.float32, 4, 2, **options), *spread)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SPREADS, st.integers(2, 8), BOOLEANS, BOOLEANS, BOOLEANS)
def test_convolution_of_any_batch(lengths, spread, width, silu, initial_states, reverse):
    options = {"bias": silu, "silu": silu, "initial_states": initial_states, "reverse": reverse}
    check(ConvCase("ring", lengths, width, torch.float32, **options), *spread)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, SPREADS, BOOLEANS, BOOLEANS, BOOLEANS)
def test_long_convolution_of_any_batch(lengths, spread, gates, initial_states, reverse):
    options = {"bias": gates, "silu": gates, "initial_states": initial_states, "reverse": reverse}
    check(LongConvCase("ring", lengths, 3, torch.float32, 3, **options), *spread)


LONG = (700, 1, 0, 333, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", WORLDS)
def test_long_sequences(world, layout, dtype):
    spread = {"layout": layout}
    check(ScanCase("ring", LONG, 16, dtype, 8, **EVERYTHING), world, spread)
    check(ConvCase("ring", LONG, 4, dtype, 8, True, True, True), world, spread)
    check(LongConvCase("ring", LONG, 4, dtype, 4, True, True, True), world, spread)


def test_sequences_with_their_own_ranks_and_shards():
    spread = {"spans": [(0, 4), (2, 2), (0, 2), (0, 4), (2, 1)], "ulysses": [2, 1, 2, 1, 1]}
    check(ScanCase("ring", LONG, 16, torch.float32, 8, **EVERYTHING), 4, spread)
    check(ConvCase("ring", LONG, 4, torch.float32, 8, True, True, True), 4, spread)
    check(LongConvCase("ring", LONG, 4, torch.float32, 4, True, True, True), 4, spread)


def runs_of(group, rank: int, case, spread: dict) -> list[str]:
    """The mixers' forward operators that a rank runs."""
    with torch.profiler.profile() as trace:
        on_rank(group, rank, case, spread, "cpu")
    return [event.name for event in trace.events() if event.name in ("packseq::selective_scan", "packseq::long_conv")]


@pytest.mark.parametrize("reverse", [False, True])
def test_long_convolution_of_long_and_short_pieces(reverse):
    """Long ones are taken one by one, a scan goes over the others; on ranks with both, or one kind."""
    case = LongConvCase("ring", (3, 1, 1300, 4, 700, 2100), 4, torch.float32, 4, True, True, True, reverse)
    check(case, 2, {})
    check(case, 2, {"layout": "contiguous"})


def gradients_of_outputs_alone(group, rank: int, lengths: list[int], spread: dict) -> Tensor:
    tensors, gradients, _ = long_conv_inputs(LongConvCase("ring", lengths, 4, torch.float32, 3), "cpu")
    sharding = shard(boundaries(lengths, "cpu"), group.size(), **spread)
    u = sharding.shard(tensors["u"], rank).requires_grad_()
    out = long_conv_of_outputs(u, tensors, sharding, group)
    return torch.autograd.grad(out, u, sharding.shard(gradients["out"], rank))[0]


def long_conv_of_outputs(u: Tensor, tensors: Tensors, *where) -> Tensor:
    x, B, C = (tensors[name] for name in ("x", "B", "C"))
    k = 2 * ((C * B)[..., None] * (x[..., None] * torch.arange(2000)).exp()).real.sum(1)
    return packseq.long_conv(u, k, *where) if len(where) == 1 else ring_long_conv(u, k, (x, B, C), *where)


@pytest.mark.parametrize("lengths", [(1800,), (900, 30), (3,)], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_gradients_come_back_where_nobody_asks_for_states(lengths, layout):
    """From ranks, too, whose pieces start from nothing, or that have none."""
    tensors, gradients, _ = long_conv_inputs(LongConvCase("ring", lengths, 4, torch.float32, 3), "cpu")
    u = tensors["u"].requires_grad_()
    out = long_conv_of_outputs(u, tensors, boundaries(lengths, "cpu"))
    (expected,) = torch.autograd.grad(out, u, gradients["out"])
    spread = {"layout": layout}
    parts = ranks().run(gradients_of_outputs_alone, 4, lengths, spread)
    got = shard(boundaries(lengths, "cpu"), 4, **spread).unshard(parts)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def long_conv_of_whole(group, rank: int, lengths: list[int], cut: bool) -> Tensor:
    """Of the first sequence, whole on one rank, from a state and without: whatever else there is."""
    spans = [(0, 1), *[(0, group.size() if cut else 1)] * (len(lengths) - 1)]
    sharding = shard(boundaries(lengths, "cpu"), group.size(), spans=spans)
    tensors, _, _ = long_conv_inputs(LongConvCase("ring", (900, 40), 4, torch.float32, 3), "cpu")
    u = tensors["u"][: lengths[0]]
    u = sharding.shard(torch.cat([u, torch.ones(sum(lengths) - len(u), 3)]), rank)
    modes = tuple(tensors[name] for name in ("x", "B", "C"))
    k = 2 * ((modes[2] * modes[1])[..., None] * (modes[0][..., None] * torch.arange(940)).exp()).real.sum(1)
    states = torch.ones(len(lengths), *modes[0].shape, dtype=torch.complex64)
    outs = [ring_long_conv(u, k, modes, sharding, group, initial_states=s) for s in (None, states)]
    return torch.stack([out[: lengths[0]] for out in outs]) if rank == 0 else torch.empty(0)


@pytest.mark.parametrize("length", [40, 900])
def test_a_whole_sequence_is_convolved_alike_whatever_else_there_is(length):
    alone, *others = (
        ranks().run(long_conv_of_whole, 2, [length, *rest], cut)[0]
        for rest, cut in (([], False), ([5] * 100, False), ([700], False), ([3, 1300], True))
    )
    for x in others:
        assert_same_bits("out", x, alone)


@pytest.mark.parametrize("lengths", [(), (1,), (64, 65), (4097, 3, 4096, 70), (300_000,)], ids=str)
def test_sums_of_pieces(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    levels = carry._levels(bounds)
    for below, level in itertools.pairwise(levels):
        assert (below.diff() <= 64).all()
        assert level[-1] == len(below) - 1
    x = torch.randn(int(bounds[-1]), 2, dtype=torch.float64)
    expected = [part.sum(0) for part in x.split(list(lengths))] if lengths else []
    torch.testing.assert_close(carry._sums(x, levels), torch.stack(expected) if lengths else x[:0])


@pytest.mark.parametrize("initial_states", [False, True])
def test_whole_sequences_are_computed_once(initial_states):
    spread = {"spans": [(0, 1), (2, 1), (3, 1), (1, 1), (3, 1)]}  # rows for every rank
    everything = EVERYTHING | {"initial_states": initial_states}
    cases = {
        "selective_scan": ScanCase("ring", LONG, 16, torch.float32, 8, **everything),
        "long_conv": LongConvCase("ring", LONG, 4, torch.float32, 4, True, True, initial_states),
    }
    for name, case in cases.items():
        check(case, 4, spread)
        if name == "selective_scan" or not initial_states:  # the long convolution has its own way with states
            assert_same_bits("out", on_ranks(case, 4, spread)["out"], on_one(case, "cpu")["out"])
        for names in ranks().run(runs_of, 4, case, spread):
            assert names.count(f"packseq::{name}") == 1
            assert name == "long_conv" or len(names) == 1  # its states and what they add are scans of their own


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [2, 4])
def test_over_nccl(world, layout, dtype):
    spread = {"layout": layout}
    check(ScanCase("ring", LONG, 16, dtype, 64, **EVERYTHING), world, spread, "cuda")
    check(ConvCase("ring", LONG, 4, dtype, 64, True, True, True), world, spread, "cuda")
    check(LongConvCase("ring", LONG, 4, dtype, 8, True, True, True), world, spread, "cuda")


def test_sequences_shorter_than_the_filter_over_many_ranks():
    check(ConvCase("ring", (9, 3, 0, 17), 8, torch.float32, initial_states=True), 8, {})


@pytest.mark.parametrize(
    "case",
    [
        ScanCase("ring", LONG, 16, torch.bfloat16, 8, **EVERYTHING),
        ConvCase("ring", LONG, 4, torch.bfloat16, 8, True, True, True),
        LongConvCase("ring", LONG, 4, torch.bfloat16, 4, True, True, True),
    ],
    ids=["scan", "conv1d", "long_conv"],
)
def test_the_same_bits_every_time(case):
    first, second = (on_ranks(case, 4, {}) for _ in range(2))
    for name, x in first.items():
        assert_same_bits(name, x, second[name])


def test_nan_stays_in_its_sequence():
    case = ScanCase("ring", (40, 33, 21), 4, torch.float32, 4, **MAMBA)
    bad = ranks().run(on_rank, 4, case, {}, "cpu", 1)
    sharding = shard(boundaries(case.lengths, "cpu"), 4)
    clean = on_ranks(case, 4, {})
    keep = torch.ones(94, dtype=torch.bool)
    keep[40:73] = False
    for name in ("out", "du", "ddelta", "dz", "dB", "dC"):
        x = sharding.unshard([part[name][:-SLACK] for part in bad])
        assert x[~keep].isnan().any()
        assert_same_bits(name, x[keep], clean[name][keep])
