"""packseq.selective_scan and packseq.causal_conv1d against float64: accuracy, extremes, states, sizes. Their steps,
layouts and errors are in test_scan_*.py, the promises that they share with every operator in test_promises.py."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import packseq
import pytest
import scan_reference as reference
import torch
from compare import EXP2_ERROR, ULPS_OF_TERMS, assert_accurate, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import boundaries, free_memory, statistics
from scan_cases import (
    CONV_CASES,
    CONV_CPU_ONLY,
    CONV_ON_CPU,
    EVERYTHING,
    MAMBA,
    SCAN_CASES,
    SCAN_CPU_ONLY,
    SCAN_ON_CPU,
    ConvCase,
    ScanCase,
)
from scan_inputs import conv_inputs, scan_inputs
from tensors import Tensors, exact_of, real, with_gradients
from torch import Tensor

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def exactly(function: Callable, tensors: Tensors, gradients: Tensors, total: int) -> tuple[Tensors, dict[str, float]]:
    """The same in float64, and the largest norm of the terms that a gradient sums: a shared parameter's over the rows,
    B's and C's over the channels of a group."""
    tensors, gradients = exact_of(tensors), exact_of(gradients)
    shared = [name for name, x in tensors.items() if name in PARAMETERS and x.dim() == PARAMETERS[name]]
    copies = {name: tensors[name].expand(total, *tensors[name].shape) for name in shared}
    groups = {name: x.shape[1] for name, x in tensors.items() if name in ("B", "C") and x.dim() == 3}
    for name, count in groups.items():
        copies[name] = tensors[name].repeat_interleave(tensors["u"].shape[1] // count, 1)
    results = with_gradients(function, tensors | copies, gradients)
    norms = {}
    for name in shared:
        terms = results["d" + name]
        results["d" + name] = terms.sum(0)
        norms["d" + name] = terms.abs().square().sum(0).sqrt().max().item()
    for name, count in groups.items():
        terms = results["d" + name].unflatten(1, (count, -1))
        results["d" + name] = terms.sum(2)
        norms["d" + name] = terms.abs().square().sum(2).sqrt().max().item() if terms.numel() else 0.0
    return results, norms


# Their dimensions where they are shared by all rows.
PARAMETERS = {"A": 2, "B": 2, "C": 2, "D": 1, "delta_bias": 1, "weight": 2, "bias": 1}


def independent_errors(decay: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(decay.numel())
    signs = torch.randint(0, 2, decay.shape, generator=generator) * 2 - 1
    return EXP2_ERROR * signs.to(decay.device, decay.real.dtype)


DECAY_ERRORS = [lambda decay: torch.full_like(decay.real, EXP2_ERROR), independent_errors]


def check(operator: str, tensors: Tensors, gradients: Tensors, options: dict, lengths) -> None:
    cu_seqlens = boundaries(lengths, gradients["out"].device)

    def ours(**x):
        return getattr(packseq, operator)(**x, cu_seqlens=cu_seqlens, **options, return_final_states=True)

    def plain(**x):
        return getattr(reference, operator)(**x, lengths=lengths, **options)

    got = with_gradients(ours, tensors, gradients)
    exact, norms = exactly(plain, tensors, gradients, sum(lengths))
    theirs = with_gradients(plain, tensors, gradients)
    ulp = torch.finfo(statistics(gradients["out"].dtype)).eps
    inexact = []
    if "A" in tensors:  # kernels compute powers of two: A log2(e) is rounded once, like A by half an ulp
        rounded = exact_of(tensors) | {"A": exact_of(tensors)["A"] * (1 + ulp / 2)}
        errors = DECAY_ERRORS if gradients["out"].is_cuda else [None]
        inexact = [exactly(partial(plain, decay_error=e), rounded, gradients, sum(lengths))[0] for e in errors]
    for name in got:
        floor = ULPS_OF_TERMS * ulp * norms.get(name, 0.0)
        if exact[name].numel():
            if name in ("dA", "dD", "ddelta_bias"):
                # Sums over the tokens, one after another: each rounds by a quarter of an ulp, and roots of many add up.
                floor += 0.25 * sum(lengths) ** 0.5 * ulp * exact[name].abs().max().item()
            floor += sum((x[name] - exact[name]).abs().max().item() for x in inexact)
        assert_accurate(name, *(real(results[name]) for results in (got, exact, theirs)), floor=floor)


def check_scan(case: ScanCase, device: str) -> None:
    check("selective_scan", *scan_inputs(case, device), case.lengths)


def check_conv(case: ConvCase, device: str) -> None:
    check("causal_conv1d", *conv_inputs(case, device), case.lengths)


@pytest.mark.parametrize("case", [*SCAN_ON_CPU, *SCAN_CPU_ONLY], ids=str)
def test_accuracy_of_scans_on_the_cpu(case):
    check_scan(case, "cpu")


@pytest.mark.parametrize("case", [*CONV_ON_CPU, *CONV_CPU_ONLY], ids=str)
def test_accuracy_of_convolutions_on_the_cpu(case):
    check_conv(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCAN_CASES, ids=str)
def test_accuracy_of_scans_on_the_gpu(case):
    check_scan(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_accuracy_of_convolutions_on_the_gpu(case):
    check_conv(case, "cuda")


def test_cases_have_names_of_their_own():
    names = [str(case) for case in [*SCAN_CASES, *SCAN_CPU_ONLY, *CONV_CASES, *CONV_CPU_ONLY]]
    assert len(set(names)) == len(names)


@st.composite
def random_scans(draw) -> ScanCase:
    lengths = (*draw(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 90)), max_size=6)), 50)
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    switches = ("complex", "D", "z", "delta_bias", "delta_softplus", "initial_states", "reverse")
    return ScanCase(
        *("random", lengths, draw(st.integers(1, 40)), draw(st.sampled_from([F32, BF16, torch.float16]))),
        *(groups * per_group, groups),
        constant=draw(st.sampled_from(["", "", "B", "C", "BC"])),
        **{name: draw(st.booleans()) for name in switches},
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=random_scans())
def test_accuracy_of_random_scans_on_the_cpu(case):
    check_scan(case, "cpu")


@pytest.mark.gpu
@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=random_scans())
def test_accuracy_of_random_scans_on_the_gpu(case):
    check_scan(case, "cuda")


def test_the_references_are_what_torch_computes():
    """The scan as a product of matrices, the convolution as torch's own."""
    case = ScanCase("torch", (7,), 3, F64, 2)
    tensors, _, _ = scan_inputs(case, "cpu")
    out, [final] = reference.selective_scan(**tensors, lengths=(7,))
    u, delta, A, B, C = tensors.values()
    log_decay = (delta[..., None] * A).cumsum(0)
    decay = torch.exp(log_decay[:, None] - log_decay[None])  # [to, from, channels, states]
    decay = torch.where(torch.ones(7, 7).tril().bool()[..., None, None], decay, 0)
    h = torch.einsum("tscn,sc,sn->tcn", decay, delta * u, B[:, 0])
    torch.testing.assert_close(out, torch.einsum("tn,tcn->tc", C[:, 0], h))
    torch.testing.assert_close(final, h[-1])

    x, weight, bias = (torch.randn(*shape, dtype=F64) for shape in ((9, 5), (5, 3), (5,)))
    out, [final] = reference.causal_conv1d(x, weight, bias, lengths=(9,))
    padded = torch.nn.functional.pad(x.t()[None], (2, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=5)
    torch.testing.assert_close(out, expected[0].t())
    assert_same_bits("final", final, x[-2:].t().contiguous())


# ---- extremes


def check_changed(device: str, change: Callable[[Tensors], None], case: ScanCase) -> None:
    tensors, gradients, options = scan_inputs(case, device)
    change(tensors)
    check("selective_scan", tensors, gradients, options, case.lengths)


EXTREMES: dict[str, Callable[[Tensors], None]] = {
    "delta-is-0": lambda x: x["delta"].zero_(),
    "delta-is-sometimes-0": lambda x: x["delta"][::3].zero_(),
    "delta-is-large": lambda x: x["delta"].add_(1e4),  # every decay underflows
    "delta-is-sometimes-large": lambda x: x["delta"][::7].add_(3e4),
    "delta-is-very-negative": lambda x: x["delta"].sub_(60),
    "delta-around-softplus-threshold": lambda x: x["delta"].add_(20),
    "A-is-0": lambda x: x["A"].zero_(),
    "A-is-near-0": lambda x: x["A"].mul_(1e-30),
    "A-is-large": lambda x: x["A"].mul_(1e5),
    "A-is-mixed": lambda x: x["A"][::2].zero_(),
}


FOR_SOFTPLUS = {"delta-is-very-negative", "delta-around-softplus-threshold"}


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(
    ("name", "softplus"), [(n, on) for n, on in product(EXTREMES, (False, True)) if on or n not in FOR_SOFTPLUS]
)
def test_extremes(device, name, softplus, is_complex):
    case = ScanCase(
        *(f"{name}-{softplus}-{is_complex}", (70, 1, 0, 33), 5, F32, 8),
        **{"complex": is_complex, "delta_softplus": softplus, "initial_states": True, "D": True},
    )
    check_changed(device, EXTREMES[name], case)


def test_a_step_out_of_range_changes_nothing_before_it():
    """On the CPU tokens are walked without clamps where all steps of a tile allow it."""
    tensors, _, options = scan_inputs(ScanCase("out of range", (64,), 40, F32, 8), "cpu")
    arguments = tensors | options | {"cu_seqlens": boundaries([64])}
    before = packseq.selective_scan(**arguments)
    for token, step in ((63, 1e6), (40, 1e30), (20, -1e6)):
        delta = tensors["delta"].clone()
        delta[token] = step
        after = packseq.selective_scan(**arguments | {"delta": delta})
        assert_same_bits(f"before token {token}", after[:token], before[:token])


def test_products_that_underflow_long_before_the_end(device):
    """Where sums of logarithms or ratios of cumulated products would overflow or divide by zero."""
    case = ScanCase("underflow", (2000,), 4, F32, 4, delta_softplus=True)
    check_changed(device, lambda x: x["A"].mul_(30), case)


def test_a_long_sequence(device):
    case = ScanCase("long", (131_072,), 2, F32, 2, **MAMBA, initial_states=True)

    def remember(x: Tensors) -> None:
        x["A"].mul_(1e-2)
        x["delta"].sub_(4)

    check_changed(device, remember, case)


def test_a_long_convolution(device):
    check_conv(ConvCase("long", (131_072,), 4, F32, 3, True, True, True), device)


# ---- states


def test_gradient_of_one_output_alone(device):
    for operator, inputs, case in (
        ("selective_scan", scan_inputs, ScanCase("one", (40, 3, 0), 4, F32, **EVERYTHING)),
        ("causal_conv1d", conv_inputs, ConvCase("one", (40, 3, 0), 4, F32, initial_states=True)),
    ):
        tensors, gradients, options = inputs(case, device)
        cu = boundaries(case.lengths, device)

        def call(operator=operator, options=options, cu=cu, **x):
            return getattr(packseq, operator)(**x, cu_seqlens=cu, **options, return_final_states=True)

        for used, unused in (("out", "final_states"), ("final_states", "out")):
            zeros = gradients | {unused: torch.zeros_like(gradients[unused])}
            both = with_gradients(call, tensors, zeros)
            leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
            result = dict(zip(("out", "final_states"), call(**leaves), strict=True))[used]
            grads = torch.autograd.grad(result, list(leaves.values()), gradients[used])
            for name, grad in zip(leaves, grads, strict=True):
                torch.testing.assert_close(grad, both["d" + name], rtol=0, atol=0)
        assert both["dinitial_states"].abs().max() > 0


def test_gradients_from_final_states_alone_where_delta_has_a_bias(device):
    """Whatever a kernel fills its last chunk up with must not decay the state's gradient."""
    for length in (1, 5, 63, 64, 65, 100):
        case = ScanCase(
            f"final{length}", (length,), 8, F32, 8, delta_bias=True, delta_softplus=True, initial_states=True
        )
        tensors, gradients, options = scan_inputs(case, device)
        tensors["delta_bias"].add_(2)
        gradients["out"].zero_()
        check("selective_scan", tensors, gradients, options, case.lengths)


def parts_of(length: int, cuts: list[int]) -> list[slice]:
    edges = [0, *cuts, length]
    return [slice(a, b) for a, b in pairwise(edges)]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_a_sequence_in_parts_that_carry_the_state(device, is_complex, reverse):
    case = ScanCase("parts", (300,), 6, F32, 8, 2, is_complex, **MAMBA | {"initial_states": True})
    tensors, gradients, options = scan_inputs(case, device)
    options["reverse"] = reverse

    def whole(**x):
        return packseq.selective_scan(**x, **options, return_final_states=True)

    def in_parts(initial_states, **x):
        per_token = {name: x.pop(name) for name in ("u", "delta", "B", "C", "z")}
        parts, outs, state = parts_of(300, [1, 64, 65, 200]), [], initial_states
        for rows in reversed(parts) if reverse else parts:
            some = {name: y[rows] for name, y in per_token.items()}
            out, state = packseq.selective_scan(**some, **x, **options, initial_states=state, return_final_states=True)
            outs.append(out)
        return torch.cat(outs[::-1] if reverse else outs), state

    expected, got = (with_gradients(f, tensors, gradients) for f in (whole, in_parts))
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=2e-6 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_convolution_in_parts_that_carry_the_state(device, reverse):
    case = ConvCase("parts", (300,), 4, F32, 7, bias=True, silu=True, initial_states=True)
    tensors, gradients, _ = conv_inputs(case, device)
    options = {"activation": "silu", "reverse": reverse, "return_final_states": True}

    def in_parts(x, initial_states, **parameters):
        parts, outs, state = parts_of(300, [1, 2, 64, 200, 202]), [], initial_states
        for rows in reversed(parts) if reverse else parts:
            out, state = packseq.causal_conv1d(x[rows], **parameters, **options, initial_states=state)
            outs.append(out)
        return torch.cat(outs[::-1] if reverse else outs), state

    expected = with_gradients(lambda **x: packseq.causal_conv1d(**x, **options), tensors, gradients)
    got = with_gradients(in_parts, tensors, gradients)
    for name in ("out", "final_states"):
        assert_same_bits(name, got[name], expected[name])
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-5, atol=1e-4 if name in ("dweight", "dbias") else 1e-5
        )


def flipped(x: Tensor, lengths) -> Tensor:
    return torch.cat([part.flip(0) for part in x.split(list(lengths))])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reverse_is_the_flipped_sequence(device, dtype):
    rows = ("u", "delta", "B", "C", "z", "x", "out")
    by_row = {*rows, *("d" + name for name in rows)}
    for operator, inputs, case in (
        ("selective_scan", scan_inputs, ScanCase("flip", (70, 0, 1, 200), 9, dtype, **EVERYTHING)),
        ("causal_conv1d", conv_inputs, ConvCase("flip", (70, 0, 1, 200), 4, dtype, 6, True, True, True, True)),
    ):
        tensors, gradients, options = inputs(case, device)
        cu = boundaries(case.lengths, device)

        def flip(group: Tensors, lengths=case.lengths) -> Tensors:
            return {n: flipped(x, lengths) if n in by_row else x for n, x in group.items()}

        def call(operator=operator, cu=cu, options=options, reverse=True, **x):
            more = options | {"reverse": reverse, "return_final_states": True}
            return getattr(packseq, operator)(**x, cu_seqlens=cu, **more)

        backwards = with_gradients(call, tensors, gradients)
        forwards = flip(with_gradients(lambda call=call, **x: call(reverse=False, **x), flip(tensors), flip(gradients)))
        for name in ("out", "final_states", "du", "dx"):
            if name in backwards:
                assert_same_bits(name, forwards[name], backwards[name])
        for name, expected in backwards.items():
            limit = torch.finfo(dtype).eps * 8 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(forwards[name], expected, rtol=0, atol=limit)


def test_one_sequence_where_no_boundaries_are_given(device):
    for operator, inputs, case in (
        ("selective_scan", scan_inputs, ScanCase("one", (9,), 3, F32, initial_states=True)),
        ("causal_conv1d", conv_inputs, ConvCase("one", (9,), 3, F32, initial_states=True)),
    ):
        tensors, _, _ = inputs(case, device)
        call = getattr(packseq, operator)
        for tensors_now, n in ((tensors, 9), ({name: x[:0] if len(x) == 9 else x for name, x in tensors.items()}, 0)):
            out, states = call(**tensors_now, return_final_states=True)
            expected = call(**tensors_now, cu_seqlens=boundaries([n], device), return_final_states=True)
            assert_same_bits("out", out, expected[0])
            assert_same_bits("states", states, expected[1])
            assert_same_bits("alone", call(**tensors_now), out)
        assert_same_bits("nothing happened", states, tensors["initial_states"])  # after no rows
        without = call(**{name: x for name, x in tensors.items() if name != "initial_states"})
        assert not torch.equal(without, call(**tensors))  # one sequence's state is not ignored


def test_raw_operators_return_states_on_request(device):
    tensors, _, _ = scan_inputs(ScanCase("raw", (9,), 3, F32), device)
    cu = boundaries([9], device)
    out, states = torch.ops.packseq.selective_scan(*tensors.values(), cu)  # every option has a default
    assert_same_bits("out", out, packseq.selective_scan(**tensors))
    assert states.shape == (0, 6, 3)
    out, states = torch.ops.packseq.causal_conv1d(tensors["u"], torch.ones(6, 4, device=device), cu)
    assert states.shape == (0, 6, 3)


# ---- sizes


def test_more_sequences_and_channels_than_a_grid_is_high(device):
    n = 70_000
    u = torch.linspace(-1, 1, n, device=device)[:, None]
    ones = torch.ones(n, 1, 1, device=device)
    A = -torch.ones(1, 1, device=device)
    cu = torch.arange(n + 1, dtype=torch.int32, device=device)
    torch.testing.assert_close(packseq.selective_scan(u, u.abs(), A, ones, ones, cu), u * u.abs())
    u, wide = u.t().contiguous(), A.expand(n, 1)
    torch.testing.assert_close(packseq.selective_scan(u, u.abs(), wide, ones[:1], ones[:1]), u * u.abs())
    weight = torch.ones(1, 2, device=device)
    torch.testing.assert_close(packseq.causal_conv1d(u.t().contiguous(), weight, cu_seqlens=cu), u.t())
    torch.testing.assert_close(packseq.causal_conv1d(u, weight.expand(n, 2)), u)


@pytest.mark.big
def test_states_beyond_two_to_the_31(device):
    """One token of many sequences, whose states have more elements than 32 bits count."""
    n, channels, states = 2100, 4096, 256
    if free_memory(device) < 6 * 4 * n * channels * states:
        pytest.skip("needs 53 GB of memory")
    u = torch.randn(n, channels, device=device)
    B, C = (torch.randn(n, 1, states, device=device) for _ in range(2))
    A = -torch.ones(channels, states, device=device)
    initial = torch.zeros(n, channels, states, device=device)
    initial[-1] = 1
    cu = torch.arange(n + 1, dtype=torch.int32, device=device)

    def results(rows: slice) -> list[Tensor]:
        tensors = [x if x is A else x[rows] for x in (u, u.abs(), A, B, C, initial)]
        leaves = [x.detach().requires_grad_() for x in tensors]
        own = cu[: len(tensors[0]) + 1]
        out, final = packseq.selective_scan(*leaves[:5], own, initial_states=leaves[5], return_final_states=True)
        gradients = torch.autograd.grad(out.sum() + final[-1].sum(), [leaves[0], leaves[5]])
        return [x[-1].detach().clone() for x in (out, final, *gradients)]

    names = ("out", "final state", "du", "gradient of the initial state")
    for name, got, expected in zip(names, results(slice(None)), results(slice(-1, None)), strict=True):
        assert_same_bits(name, got, expected)
