"""packseq.long_conv against float64: accuracy, causality, magnitudes, states, layouts and errors. The promises that it
shares with every operator are in test_promises.py, S4's step in test_s4_step.py."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import longconv_reference as reference
import packseq
import pytest
import torch
from bad_input import assert_raises, bad_boundaries, zeros
from compare import EXP2_ERROR, ULPS_OF_TERMS, assert_accurate, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from longconv_cases import CONV_CASES, CONV_CPU_ONLY, CONV_ON_CPU, EVERYTHING, SWITCHES, ConvCase
from longconv_inputs import conv_inputs, decaying, uniform
from operators import boundaries, captured, statistics
from tensors import LAYOUTS, Draw, Tensors, exact_of, laid_out, real, with_gradients
from torch import Tensor

F32, BF16, F16, F64, C64 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64

# ---- accuracy

SHARED = ("dk", "dk_after", "dD")


def check(case: ConvCase, device: str, change: Callable[[Tensors], None] = lambda tensors: None) -> None:
    tensors, gradients, options = conv_inputs(case, device)
    change(tensors)
    cu_seqlens = boundaries(case.lengths, device)
    got = with_gradients(lambda **x: (packseq.long_conv(**x, cu_seqlens=cu_seqlens, **options),), tensors, gradients)
    plain = partial(reference.long_conv, lengths=case.lengths, **options)
    theirs = with_gradients(plain, tensors, gradients)
    wide, wide_gradients = ({name: x.double() for name, x in group.items()} for group in (tensors, gradients))
    exact = with_gradients(plain, wide, wide_gradients)
    squares = with_gradients(
        plain, *({name: x.square() for name, x in group.items()} for group in (wide, wide_gradients))
    )
    for name in got:
        floor = 0.0
        if name in SHARED:  # of squares everywhere, the gradient is the sum of the terms' squares
            norm = squares[name].abs().max().sqrt().item()
            floor = ULPS_OF_TERMS * torch.finfo(statistics(case.dtype)).eps * norm
        assert_accurate(name, got[name], exact[name], theirs[name], floor=floor)


@pytest.mark.parametrize("case", [*CONV_ON_CPU, *CONV_CPU_ONLY], ids=str)
def test_accuracy_on_the_cpu(case):
    check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_accuracy_on_the_gpu(case):
    check(case, "cuda")


def test_cases_have_names_of_their_own():
    names = [str(case) for case in [*CONV_CASES, *CONV_CPU_ONLY]]
    assert len(set(names)) == len(names)


@st.composite
def random_convolutions(draw) -> ConvCase:
    lengths = (*draw(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 300)), max_size=6)), 70)
    return ConvCase(
        *("random", lengths, draw(st.integers(1, 400)), draw(st.sampled_from([F32, BF16, F16]))),
        channels=draw(st.integers(1, 40)),
        taps_after=draw(st.sampled_from([0, 1, 30, 400])),
        **{name: draw(st.booleans()) for name in SWITCHES},
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=random_convolutions())
def test_accuracy_of_random_convolutions_on_the_cpu(case):
    check(case, "cpu")


@pytest.mark.gpu
@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=random_convolutions())
def test_accuracy_of_random_convolutions_on_the_gpu(case):
    check(case, "cuda")


def test_the_reference_is_what_torch_computes():
    """Short and long: torch's own convolution, whose filters are the other way round."""
    for length, taps in ((9, 4), (9, 20), (130, 200)):
        x, k = torch.randn(length, 5, dtype=F64), torch.randn(5, taps, dtype=F64)
        padded = torch.nn.functional.pad(x.t()[None], (taps - 1, 0))
        expected = torch.nn.functional.conv1d(padded, k.flip(1)[:, None], groups=5)[0].t()
        torch.testing.assert_close(reference.convolve(x, k), expected)
        after = reference.long_conv(x, k[:, :1], k_after=k[:, 1:], lengths=[length])[0]
        expected = reference.convolve(x.flip(0), k).flip(0)
        torch.testing.assert_close(after, expected)


# ---- each trap of the field


def test_the_first_tap_is_the_current_row(device):
    """Libraries differ in the order."""
    for length in (10, 300):
        k = torch.zeros(2, 4, device=device)
        k[0, 0] = k[1, 3] = 1
        u = torch.randn(length, 2, device=device)
        shifted = torch.cat([torch.zeros(3, device=device), u[:-3, 1]])
        torch.testing.assert_close(packseq.long_conv(u, k), torch.stack([u[:, 0], shifted], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 1023, 1025])
def test_filters_longer_than_the_sequence_are_neither_cut_nor_wrapped(device, length):
    """A transform of twice the sequence truncates them, a shorter one lets them come round."""
    u, k = torch.randn(length, 3, device=device), torch.randn(3, 5 * length, device=device)
    expected = packseq.long_conv(u, k[:, :length].contiguous())
    k[:, length:] = 9  # what no row can see
    torch.testing.assert_close(packseq.long_conv(u, k), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    leaf = k.requires_grad_()
    grad = torch.autograd.grad(packseq.long_conv(u, leaf).sum(), leaf)[0]
    assert (grad[:, length:].abs() <= 1e-6 * grad.abs().max()).all()


def test_documents_of_a_pack_do_not_mix(device):
    lengths = [100, 3, 400, 65, 1]
    u, k = torch.randn(sum(lengths), 4, device=device), torch.randn(4, 500, device=device)
    together = packseq.long_conv(u, k, boundaries(lengths, device), k_after=k)
    for got, one in zip(together.split(lengths), u.split(lengths), strict=True):
        assert_same_bits("out", got, packseq.long_conv(one.contiguous(), k, k_after=k))


def test_bidirectional_filters_see_no_padding(device):
    lengths = [70, 5, 200]
    u, k = torch.randn(sum(lengths) + 9, 4, device=device), torch.randn(4, 90, device=device)
    cu = boundaries(lengths, device)
    u[sum(lengths) :] = torch.nan
    out = packseq.long_conv(u, k, cu, k_after=k)
    assert out.isfinite().all()
    assert (out[sum(lengths) :] == 0).all()
    twice = packseq.long_conv(u, k, cu) + packseq.long_conv(u, torch.cat([k[:, :1] * 0, k], 1), cu, reverse=True)
    torch.testing.assert_close(out, twice, rtol=1e-5, atol=1e-4)


# ---- causality and magnitudes


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("length", [2, 33, 63, 64])
def test_short_sequences_are_exactly_causal(device, length, dtype):
    for reverse in (False, True):
        u = torch.randn(length, 6, device=device).to(dtype)
        k = torch.randn(6, 80, device=device)
        expected = packseq.long_conv(u, k, reverse=reverse)
        for t in {*range(0, length, 7), length - 1}:
            changed = u.clone()
            changed[t] = 1e4
            before = slice(t + 1, None) if reverse else slice(0, t)
            assert_same_bits("before", packseq.long_conv(changed, k, reverse=reverse)[before], expected[before])


@pytest.mark.parametrize("length", [65, 200, 1047, 20_000])
def test_long_sequences_are_causal_within_rounding(device, length):
    u, k = torch.randn(length, 4, device=device), torch.randn(4, length, device=device)
    expected = packseq.long_conv(u, k)
    for t in (1, length // 3, length - 1):
        changed = u.clone()
        changed[t] += 10
        moved = (packseq.long_conv(changed, k) - expected)[:t].abs().max()
        assert moved <= 8 * torch.finfo(F32).eps * (changed.norm(dim=0) * k.norm(dim=1)).max(), t


@pytest.mark.parametrize("length", [40, 700, 5000])
def test_huge_rows_late_in_a_sequence(device, length):
    """Before them the error is at most twice plain torch's, whose transforms spread it too."""
    u = torch.randn(length, 4, device=device)
    u[-length // 5 :] *= 1e6
    k = torch.randn(4, length, device=device)
    before = slice(0, length - length // 5)
    results = [
        packseq.long_conv(u, k),
        *(reference.long_conv(x, y, lengths=[length])[0] for x, y in ((u, k), (u.double(), k.double()))),
    ]
    got, plain, exact = (x[before] for x in results)
    assert_accurate("before", got, exact, plain)
    assert_accurate("all", results[0], results[2], results[1])


# ---- states


def modes_of(draw: Draw, channels: int, states: int, taps: int, dtype: torch.dtype = C64) -> tuple[tuple, Tensor]:
    """Modes that forget within hundreds of steps, and the filter they make."""
    x = torch.complex(-(10 ** (-2 * uniform(draw, channels, states))), 3 * uniform(draw, channels, states)).to(dtype)
    modes = x, draw(channels, states, dtype=dtype), draw(channels, states, dtype=dtype)
    return modes, packseq.vandermonde_conj(modes[1] * modes[2], x, taps)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_a_sequence_in_parts_that_carry_the_state(device, dtype, reverse, gated):
    if device == "cuda" and dtype == F64:
        pytest.skip("a GPU takes no float64")
    draw = Draw(ConvCase("parts", (300,), 1, dtype), device)
    wide = statistics(dtype)
    (x, B, C), _ = modes_of(draw, 5, 4, 1, wide.to_complex())
    tensors = {"u": draw(300, 5, dtype=dtype), "D": draw(5, dtype=wide), "x": x, "B": B, "C": C}
    tensors["initial_states"] = draw(1, 5, 4, dtype=x.dtype)
    if gated:
        tensors |= {name: draw(300, 5, dtype=dtype) for name in ("pre_gate", "gate")}

    def in_parts(*cuts: int) -> Callable:
        def run(x, B, C, initial_states, D, **rows):
            k = packseq.vandermonde_conj(B * C, x, 300)
            edges, outs, states = [0, *cuts, 300], [], initial_states
            parts = [slice(a, b) for a, b in pairwise(edges)]
            for part in reversed(parts) if reverse else parts:
                some = {name: y[part] for name, y in rows.items()}
                options = {"modes": (x, B, C), "reverse": reverse, "return_final_states": True}
                out, states = packseq.long_conv(**some, k=k, D=D, initial_states=states, **options)
                outs.append(out)
            return torch.cat(outs[::-1] if reverse else outs), states

        return run

    gradients = {"out": draw(300, 5, dtype=dtype), "final_states": draw(1, 5, 4, dtype=x.dtype)}
    expected = with_gradients(in_parts(), tensors, gradients)
    got = with_gradients(in_parts(1, 64, 65, 200), tensors, gradients)
    ulps = 4 if dtype == BF16 else 200 if device == "cpu" else 1000  # a GPU's scan: see EXP2_ERROR
    for name in expected:
        limit = ulps * torch.finfo(dtype).eps * expected[name].abs().max().item()
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_states_are_those_of_the_recurrence(device, dtype):
    """Of several sequences, against float64 token by token; with what they add to the outputs, and its gradients."""
    lengths, draw = (70, 0, 3, 130), Draw(ConvCase("states", (203,), 1, dtype), device)
    modes, _ = modes_of(draw, 3, 2, 1)
    tensors = {name: draw(sum(lengths), 3, dtype=dtype) for name in ("u", "pre_gate", "gate")}
    tensors |= {"initial_states": draw(4, 3, 2, dtype=C64), **dict(zip(("x", "B", "C"), modes, strict=True))}
    gradients = {"out": draw(sum(lengths), 3, dtype=dtype), "final_states": draw(4, 3, 2, dtype=C64)}

    def recurrence(u, pre_gate, gate, initial_states, x, B, C):
        outs, finals, begin = [u[:0]], [], 0
        for length, h in zip(lengths, initial_states, strict=True):
            for t in range(begin, begin + length):
                h = torch.exp(x) * h + B * (reference.wide(u[t]) * reference.wide(pre_gate[t]))[:, None]
                outs.append((reference.wide(gate[t]) * 2 * (C * h).sum(1).real).to(u.dtype)[None])
            finals.append(h)
            begin += length
        return torch.cat(outs), torch.stack(finals)

    def ours(u, pre_gate, gate, initial_states, x, B, C):
        k = packseq.vandermonde_conj(B * C, x, 130)
        options = {"pre_gate": pre_gate, "gate": gate, "initial_states": initial_states, "return_final_states": True}
        return packseq.long_conv(u, k, boundaries(lengths, device), modes=(x, B, C), **options)

    got, theirs = (with_gradients(f, tensors, gradients) for f in (ours, recurrence))
    exact = with_gradients(recurrence, exact_of(tensors), exact_of(gradients))
    # Two ways to the same numbers; a GPU's errs in every decay, which adds up over the modes' memory of 100 steps.
    relative = 16 * torch.finfo(F32).eps if device == "cpu" else 200 * EXP2_ERROR
    for name in got:
        assert_accurate(name, *(real(x[name]) for x in (got, exact, theirs)), relative=relative)


def test_states_asked_for_alone(device):
    draw = Draw(ConvCase("alone", (90,), 1, F32), device)
    modes, k = modes_of(draw, 3, 2, 90)
    u, initial = draw(90, 3, dtype=F32), draw(1, 3, 2, dtype=C64)
    both, final = packseq.long_conv(u, k, modes=modes, initial_states=initial, return_final_states=True)
    assert_same_bits("out", packseq.long_conv(u, k, modes=modes, initial_states=initial), both)
    out, from_zero = packseq.long_conv(u, k, modes=modes, return_final_states=True)
    assert_same_bits("out", out, packseq.long_conv(u, k))
    assert_same_bits("unused modes", packseq.long_conv(u, k, modes=modes), out)
    torch.testing.assert_close(final - from_zero, torch.exp(90 * modes[0])[None] * initial, rtol=1e-4, atol=1e-5)


# ---- layouts


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_change_nothing(device, layout, dtype):
    case = ConvCase("strided", (40, 0, 9, 130), 60, dtype, 8, 50, **EVERYTHING)
    tensors, gradients, options = conv_inputs(case, device)
    cu = boundaries(case.lengths, device)

    def call(**x):
        return (packseq.long_conv(**x, cu_seqlens=cu, **options),)

    expected = with_gradients(call, tensors, gradients)
    got = with_gradients(call, laid_out(tensors, layout), laid_out(gradients, layout))
    for name in expected:
        assert_same_bits(name, got[name], expected[name])


def test_expanded_gradients_and_tensors(device):
    case = ConvCase("expanded", (7, 100), 30, F32, 6, 20, **EVERYTHING)
    tensors, gradients, options = conv_inputs(case, device)
    for name in ("u", "gate"):
        tensors[name] = tensors[name][:, :1].expand(107, 6)
    tensors["pre_gate"] = tensors["pre_gate"][:1].expand(107, 6)
    tensors["k"] = tensors["k"][:1].expand(6, 30)
    gradients["out"] = gradients["out"][:1, :1].expand(107, 6)
    cu = boundaries(case.lengths, device)

    def call(**x):
        return (packseq.long_conv(**x, cu_seqlens=cu, **options),)

    plain = [{n: x.contiguous() for n, x in group.items()} for group in (tensors, gradients)]
    expected, got = with_gradients(call, *plain), with_gradients(call, tensors, gradients)
    for name in expected:
        assert_same_bits(name, got[name], expected[name])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_parameters_are_widened(device, dtype):
    case = ConvCase("half", (80,), 30, dtype, 6, 20, **EVERYTHING)
    tensors, _, options = conv_inputs(case, device)
    parameters = ("k", "D", "k_after")
    half = {name: x.to(dtype) if name in parameters else x for name, x in tensors.items()}
    wide = {name: half[name].float() if name in parameters else x for name, x in tensors.items()}
    assert_same_bits("out", packseq.long_conv(**half, **options), packseq.long_conv(**wide, **options))
    leaf = half["k"].requires_grad_()
    assert torch.autograd.grad(packseq.long_conv(**half, **options).float().sum(), leaf)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_reverse_is_the_flipped_sequence(device, dtype):
    lengths = [70, 0, 1, 200]
    case = ConvCase("flip", tuple(lengths), 90, dtype, 6, 40, D=True, pre_gate=True, gate=True)
    tensors, gradients, _ = conv_inputs(case, device)
    cu = boundaries(lengths, device)

    def flip(group: Tensors) -> Tensors:
        rows = {"u", "pre_gate", "gate", "out", "du", "dpre_gate", "dgate"}
        return {n: torch.cat([p.flip(0) for p in x.split(lengths)]) if n in rows else x for n, x in group.items()}

    def call(reverse: bool, **x):
        return (packseq.long_conv(**x, cu_seqlens=cu, reverse=reverse),)

    backwards = with_gradients(partial(call, True), tensors, gradients)
    forwards = flip(with_gradients(partial(call, False), flip(tensors), flip(gradients)))
    for name, expected in backwards.items():
        limit = torch.finfo(dtype).eps * 8 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(forwards[name], expected, rtol=0, atol=limit, msg=name)


def test_one_sequence_where_no_boundaries_are_given(device):
    u, k = torch.randn(90, 3, device=device), torch.randn(3, 20, device=device)
    assert_same_bits("out", packseq.long_conv(u, k), packseq.long_conv(u, k, boundaries([90], device)))


@pytest.mark.gpu
def test_one_sequence_in_a_graph():
    case = ConvCase("graph", (900,), 700, F32, 6, 20, **EVERYTHING)
    tensors, _, options = conv_inputs(case, "cuda")
    call = partial(packseq.long_conv, **tensors, **options)
    graph, out = captured(call)
    tensors["u"].mul_(0.5)
    graph.replay()
    assert_same_bits("out", out.clone(), call())


# ---- bad input


def good(device: str) -> dict:
    draw = Draw(ConvCase("good", (6,), 3, F32), device)
    modes = tuple(decaying(draw, 4, 3, dtype=C64) for _ in range(3))
    return {
        "u": torch.zeros(6, 4, device=device),
        "k": torch.zeros(4, 9, device=device),
        "cu_seqlens": boundaries([2, 4], device),
        "modes": modes,
        "initial_states": torch.zeros(2, 4, 3, dtype=C64, device=device),
        "return_final_states": True,
    }


BAD = {
    "u-is-flat": ({"u": lambda x: x.flatten()}, r"long_conv: u must be \[total, channels\], got shape \[24\]"),
    "u-is-a-scalar": ({"u": lambda x: x[0, 0], "cu_seqlens": None}, r"u must be \[total, channels\], got shape \[\]"),
    "u-is-int": ({"u": lambda x: x.int()}, "u must be float16, bfloat16, float32 or float64, got int32"),
    "u-has-no-channels": ({"u": lambda x: x[:, :0]}, r"u must have between 1 and 2\^31 - 1 channels, got 0"),
    "k-is-flat": ({"k": lambda x: x.flatten()}, r"k must be \[channels, taps\], got shape \[36\]"),
    "k-is-empty": ({"k": lambda x: x[:, :0]}, "k must have at least one tap, got 0"),
    "k-channels": ({"k": lambda x: x[:3]}, r"k must have shape \[4, 9\], got \[3, 9\]"),
    "k-is-double": ({"k": lambda x: x.double()}, "k must be float32, got float64"),
    "k-is-complex": ({"k": lambda x: x.cfloat()}, "k must be float32, got complex64"),
    "k_after-channels": ({"k_after": zeros(3, 2)}, r"k_after must have shape \[4, 2\], got \[3, 2\]"),
    "k_after-is-empty": ({"k_after": zeros(4, 0)}, "k_after must have at least one tap, got 0"),
    "D-shape": ({"D": zeros(4, 1)}, r"D must have shape \[4\], got \[4, 1\]"),
    "D-is-double": ({"D": zeros(4, dtype=F64)}, "D must be float32, got float64"),
    "gate-shape": ({"gate": zeros(6, 1)}, r"gate must have shape \[6, 4\], got \[6, 1\]"),
    "gate-is-half": ({"gate": zeros(6, 4, dtype=F16)}, "gate must be float32 like u, got float16"),
    "pre_gate-rows": ({"pre_gate": zeros(5, 4)}, r"pre_gate must have shape \[6, 4\], got \[5, 4\]"),
    "cu-is-long": ({"cu_seqlens": lambda x: x.long()}, "cu_seqlens must be int32, got int64"),
    "no-modes": ({"modes": None}, "modes must be given where there are states, got None"),
    "two-modes": ({"modes": lambda x: x[:2]}, r"modes must be \(x, B, C\), got 2 tensors"),
    "modes-channels": (
        {"modes": lambda x: tuple(m[:3] for m in x)},
        r"modes must have shape \[4, N\], .* \[3, 3\] as x",
    ),
    "modes-sizes": (
        {"modes": lambda x: (x[0], x[1][:, :2], x[2])},
        r"modes must have shape \[4, N\], .* \[4, 2\] as B",
    ),
    "modes-are-real": (
        {"modes": lambda x: (*x[:2], x[2].real)},
        "modes must be torch.complex64 on .* torch.float32 on",
    ),
    "states-and-k_after": ({"k_after": zeros(4, 2)}, "k_after must be None where there are states"),
    "states-shape": ({"initial_states": zeros(3, 4, 3, dtype=C64)}, r"initial_states must have shape \[2, 4, 3\], got"),
    "states-are-real": ({"initial_states": zeros(2, 4, 3)}, "initial_states must be complex64 like A, got float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(device, name):
    changes, message = BAD[name]
    assert_raises(packseq.long_conv, good(device), changes, message)


@bad_boundaries
def test_bad_boundaries(device, monkeypatch, values, message):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    bad = torch.tensor(values, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=f"long_conv: {message}"):
        packseq.long_conv(torch.zeros(6, 4, device=device), torch.zeros(4, 9, device=device), bad)


def test_bad_gradients(device):
    u, k, cu = torch.zeros(6, 4, device=device), torch.zeros(4, 9, device=device), boundaries([2, 4], device)
    backward = torch.ops.packseq.long_conv_backward
    backward(u, u, k, cu, None, None, None, None, False)
    for dout, message in (
        (u[:5], r"dout must have shape \[6, 4\], got \[5, 4\]"),
        (u.half(), "dout must be float32 like u, got float16"),
    ):
        with pytest.raises(ValueError, match=f"long_conv_backward: {message}"):
            backward(dout, u, k, cu, None, None, None, None, False)


@pytest.mark.gpu
def test_what_only_a_gpu_refuses():
    u, k = torch.zeros(6, 4, device="cuda"), torch.zeros(4, 9, device="cuda")
    for arguments, message in (
        ((u, k.cpu()), "k must be on cuda:0 like u, got cpu"),
        ((u, k, boundaries([6])), "cu_seqlens must be on cuda:0 like u, got cpu"),
        ((u.double(), k.double()), "u must be float16, bfloat16 or float32 on a GPU, got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            packseq.long_conv(*arguments)
