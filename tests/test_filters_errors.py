"""What the filters' functions say of bad input."""

from functools import partial

import packseq
import pytest
import torch
from bad_input import assert_raises
from test_filters_promises import calls_of
from torch import Tensor

C64, C128 = torch.complex64, torch.complex128


def good(device: str) -> dict[str, Tensor]:
    of = partial(torch.full, dtype=C64, device=device)
    return {
        "v": of((2, 3, 4), 1),
        "z": of((9,), 1j),
        "w": of((3, 4), -1),
        "x": of((3, 4), -1),
        "u": of((2, 3, 9), 1),
        "B": of((3, 4), 1),
        "C": of((2, 3, 4), 1),
        "P": of((1, 3, 4), 1),
        "A": of((3, 4), -1),
        "dt": torch.ones(3, device=device),
    }


def cauchy(v, z, w, **_):
    return packseq.cauchy(v, z, w)


def vandermonde(v, x, length=5, **_):
    return packseq.vandermonde(v, x, length)


def transpose(u, x, **_):
    return packseq.vandermonde_transpose(u, x)


def s4(w, B, C, dt, P, length=5, **_):
    return packseq.s4_filter(w, B, C, dt, length, P=P)


def s4d(A, B, C, dt, length=5, **options):
    return packseq.s4d_filter(A, B, C, dt, length, discretization=options.get("discretization", "zoh"))


def modes(A, B, dt, **options):
    return packseq.s4d_modes(A, B, dt, discretization=options.get("discretization", "zoh"))


BAD_DIAGONAL = [  # of both functions of diagonal models
    ({"A": lambda x: x[0]}, r"A must be \[channels, poles\], got shape \[4\]"),
    ({"A": lambda x: x.real}, "A must be complex64 or complex128, got float32"),
    ({"A": lambda x: x[:, :0]}, "A must have between 1 and 1024 poles, got 0"),
    ({"A": lambda x: x.repeat(1, 257)}, "A must have between 1 and 1024 poles, got 1028"),
    ({"B": lambda x: x[:1]}, r"B must have shape \[3, 4\], got \[1, 4\]"),
    ({"B": lambda x: x[:, :1]}, r"B must have shape \[3, 4\], got \[3, 1\]"),
    ({"B": lambda x: x[None]}, r"B must have shape \[3, 4\], got \[1, 3, 4\]"),
    ({"B": lambda x: x.real}, "B must be complex64 like A, got float32"),
    ({"B": lambda x: x.to(C128)}, "B must be complex64 like A, got complex128"),
    ({"dt": lambda x: x[:1]}, r"dt must have shape \[3\], got \[1\]"),
    ({"dt": lambda x: x[0]}, r"dt must have shape \[3\], got \[\]"),
    ({"dt": lambda x: x.double()}, "dt must be float32, got float64"),
    ({"dt": lambda x: x.int()}, "dt must be float32, got int32"),
    ({"discretization": "euler"}, 'discretization must be "zoh" or "bilinear", got \'euler\''),
]
BAD = [
    (cauchy, {"w": lambda x: x[0, 0]}, r"cauchy: w must be \[\*rows, poles\], got shape \[\]"),
    (cauchy, {"w": lambda x: x.real}, "cauchy: w must be complex64 or complex128, got float32"),
    (cauchy, {"w": lambda x: x[:, :0]}, "cauchy: w must have between 1 and 1024 poles, got 0"),
    (cauchy, {"w": lambda x: x.repeat(1, 257)}, "cauchy: w must have between 1 and 1024 poles, got 1028"),
    (
        cauchy,
        {"w": lambda x: x[:2]},
        r"cauchy: v must have w's dimensions before the last, .* \[2, 3, 4\] beside \[2, 4\]",
    ),
    (cauchy, {"v": lambda x: x[0, 0]}, r"cauchy: v must have w's dimensions before the last, .* \[4\] beside \[3, 4\]"),
    (cauchy, {"v": lambda x: x[..., :3]}, r"cauchy: v must have w's 4 poles, got shape \[2, 3, 3\]"),
    (cauchy, {"v": lambda x: x.real}, "cauchy: v must be complex64 like w, got float32"),
    (cauchy, {"z": lambda x: x[None]}, r"cauchy: z must be \[nodes\], got shape \[1, 9\]"),
    (cauchy, {"z": lambda x: x.to(C128)}, "cauchy: z must be complex64 like w, got complex128"),
    (vandermonde, {"x": lambda x: x.int()}, "vandermonde: x must be complex64 or complex128, got int32"),
    (
        vandermonde,
        {"x": lambda x: x[:2]},
        r"vandermonde: v must have x's dimensions before the last, .* beside \[2, 4\]",
    ),
    (vandermonde, {"x": lambda x: x[:, :3]}, r"vandermonde: v must have x's 3 poles, got shape \[2, 3, 4\]"),
    (vandermonde, {"v": lambda x: x.imag}, "vandermonde: v must be complex64, got float32"),
    (vandermonde, {"length": 0}, "vandermonde: length must be 1 or more, got 0"),
    (transpose, {"u": lambda x: x.double()}, "vandermonde_transpose: u must be float32 or complex64, got"),
    (transpose, {"u": lambda x: x[..., :0]}, "vandermonde_transpose: u must have a last dimension of 1 or more, got 0"),
    (
        transpose,
        {"u": lambda x: x[0, 0, 0]},
        r"vandermonde_transpose: u must be \[\*groups, \*rows, length\], got shape \[\]",
    ),
    (transpose, {"x": lambda x: x[:2]}, "vandermonde_transpose: u must have x's dimensions before the last"),
    (s4, {"w": lambda x: x[0]}, r"s4_spectrum: w must be \[channels, poles\], got shape \[4\]"),
    (s4, {"w": lambda x: x.real}, "s4_spectrum: w must be complex64 or complex128, got float32"),
    (s4, {"w": lambda x: x[:, :0]}, "s4_spectrum: w must have between 1 and 1024 poles, got 0"),
    (s4, {"B": lambda x: x[:, :3]}, r"s4_spectrum: B must have shape \[3, 4\], got \[3, 3\]"),
    (s4, {"B": lambda x: x.real}, "s4_spectrum: B must be complex64, got float32"),
    (s4, {"C": lambda x: x[:, :2]}, r"s4_spectrum: C must have shape \[2, 3, 4\], got \[2, 2, 4\]"),
    (s4, {"C": lambda x: x[0, 0]}, r"s4_spectrum: C must be \[channels, poles\] or \[filters, channels, poles\], got"),
    (s4, {"C": lambda x: x.to(C128)}, "s4_spectrum: C must be complex64, got complex128"),
    (s4, {"dt": lambda x: x[:2]}, r"s4_spectrum: dt must have shape \[3\], got \[2\]"),
    (s4, {"dt": lambda x: x.double()}, "s4_spectrum: dt must be float32, got float64"),
    (s4, {"P": lambda x: x[0]}, r"s4_spectrum: P must be \[rank, channels, poles\], got shape \[3, 4\]"),
    (s4, {"P": lambda x: x.repeat(3, 1, 1)}, "s4_spectrum: P must have rank 1 or 2, got 3"),
    (s4, {"P": lambda x: x[:, :, :2]}, r"s4_spectrum: P must have shape \[1, 3, 4\], got \[1, 3, 2\]"),
    (s4, {"length": 0}, "s4_spectrum: length must be 1 or more, got 0"),
    *((s4d, changes, f"s4d_filter: {message}") for changes, message in BAD_DIAGONAL),
    *((modes, changes, f"s4d_modes: {message}") for changes, message in BAD_DIAGONAL),
    (s4d, {"C": lambda x: x[:, :1]}, r"s4d_filter: C must have shape \[2, 3, 4\], got \[2, 1, 4\]"),
    (s4d, {"C": lambda x: x[..., :1]}, r"s4d_filter: C must have shape \[2, 3, 4\], got \[2, 3, 1\]"),
    (s4d, {"C": lambda x: x[0, :1]}, r"s4d_filter: C must have shape \[3, 4\], got \[1, 4\]"),
    (s4d, {"C": lambda x: x[0, 0]}, r"s4d_filter: C must be \[channels, poles\] or \[filters, channels, poles\], got"),
    (s4d, {"C": lambda x: x[None]}, r"s4d_filter: C must be \[channels, poles\] or \[filters, channels, poles\], got"),
    (s4d, {"C": lambda x: x.real}, "s4d_filter: C must be complex64 like A, got float32"),
    (s4d, {"length": 0}, "s4d_filter: length must be 1 or more, got 0"),
]


@pytest.mark.parametrize(("call", "changes", "message"), BAD, ids=lambda x: x.__name__ if callable(x) else None)
def test_bad_input(device, call, changes, message):
    assert_raises(call, good(device), changes, message)


def test_bad_gradients(device):
    for function, args in calls_of(device):
        if function.name().endswith("_backward"):
            name = function.name().removeprefix("packseq::")
            with pytest.raises(ValueError, match=f"{name}: dout must have shape"):
                function(args[0][..., :-1], *args[1:])
            with pytest.raises(ValueError, match=f"{name}: dout must be"):
                function(args[0].int() if not args[0].is_complex() else args[0].real, *args[1:])


@pytest.mark.gpu
def test_what_only_a_gpu_refuses():
    arguments = good("cuda")
    for call, name, message in (
        (cauchy, "v", "v must be on cuda:0 like w, got cpu"),
        (cauchy, "z", "z must be on cuda:0 like w, got cpu"),
        (vandermonde, "v", "v must be on cuda:0 like x, got cpu"),
        (s4, "dt", "dt must be on cuda:0 like w, got cpu"),
        (s4d, "B", "s4d_filter: B must be on cuda:0 like A, got cpu"),
        (s4d, "C", "s4d_filter: C must be on cuda:0 like A, got cpu"),
        (modes, "dt", "s4d_modes: dt must be on cuda:0 like A, got cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments | {name: arguments[name].cpu()})
    with pytest.raises(ValueError, match="w must be complex64 on a GPU, got complex128"):
        cauchy(**{name: x.to(C128) for name, x in arguments.items()})
