"""HiPPO's state matrices, and the diagonal and diagonal-plus-low-rank forms that S4 and S4D start from.

A state x of ``states`` numbers follows ``x' = A x + B u``, and holds what it remembers of u as coefficients of a basis.
All is computed in float64, on the CPU, once for a layer.

Sources: Gu et al., arXiv 2008.07669 (HiPPO), 2111.00396 (S4), 2206.11893 (S4D), 2206.12037 (the Fourier basis).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MEASURES = ("legs", "legt", "fourier")
DIAGONALS = ("legs", "lin", "inv")


class DiagonalPlusLowRank(NamedTuple):
    """``A = V (diag(w) - P P^*) V^*``, of which one of each conjugate pair is kept: the other half of w, P, B, and of
    V's columns, are the conjugates of these. Then ``x = 2 Re(V h)`` where ``h' = (diag(w) - P P^*) h + B u``."""

    w: Tensor  # complex128 [states / 2]
    P: Tensor  # complex128 [rank, states / 2], rank 1, or 2 for "legt"
    B: Tensor  # complex128 [states / 2]: V^* B
    V: Tensor  # complex128 [states, states / 2], with its conjugates a unitary matrix


def hippo(measure: str, states: int) -> tuple[Tensor, Tensor]:
    """The matrices A ``[states, states]`` and B ``[states]``, float64.

    Args:
        measure: what of the past is remembered, and how. ``"legs"``: all of it, the further back the coarser, in
            scaled Legendre polynomials; ``"legt"``: the last unit of time, in Legendre polynomials; ``"fourier"``: the
            same in sines and cosines (1, then a cosine and a sine of each frequency).
        states: 1 or more.
    """
    _check("hippo", "measure", measure, MEASURES, states)
    n = torch.arange(states, dtype=torch.float64)
    if measure == "fourier":
        ends = _fourier_ends(states)
        return _fourier_turn(states) - 2 * torch.outer(ends, ends), 2 * ends
    root = (2 * n + 1).sqrt()
    below = torch.outer(root, root).tril(-1)
    if measure == "legs":
        return -below - torch.diag(n + 1), root
    sign = 1 - 2 * ((n[:, None] - n) % 2)
    return -below - (sign * torch.outer(root, root)).triu(), root


def low_rank(measure: str, states: int) -> Tensor:
    """The real P ``[rank, states]`` with which ``A + P^T P`` is normal: a multiple of one, plus a skew matrix."""
    _check("low_rank", "measure", measure, MEASURES, states)
    n = torch.arange(states, dtype=torch.float64)
    if measure == "fourier":
        return math.sqrt(2) * _fourier_ends(states)[None]
    if measure == "legs":
        return (n + 0.5).sqrt()[None]
    even = (n % 2 == 0).double()
    return (2 * n + 1).sqrt() * torch.stack([even, 1 - even])


def diagonal_plus_low_rank(measure: str, states: int) -> DiagonalPlusLowRank:
    """:func:`hippo`'s matrices in the basis where they are diagonal plus low-rank. ``states`` must be even.

    Half of the poles are kept, those on and above the real axis, from the fastest to the slowest.
    """
    _check("diagonal_plus_low_rank", "measure", measure, MEASURES, states, even=True)
    A, B = hippo(measure, states)
    P = low_rank(measure, states)
    if measure == "fourier":
        w, V = _fourier_poles(states)
    else:
        normal = A + P.T @ P
        # The diagonal is constant, and what is left is skew: i times a Hermitian matrix, whose eigenvectors are
        # orthogonal to rounding. Its eigenvalues come in pairs of both signs, in ascending order.
        decay, skew = normal.diagonal().mean(), (normal - normal.T) / 2
        rates, vectors = torch.linalg.eigh(-1j * skew)
        w, V = torch.complex(decay.expand(states // 2), rates[states // 2 :]), vectors[:, states // 2 :]
    w, V = w.flip(0), V.flip(1)
    back = V.mH
    return DiagonalPlusLowRank(w, P.to(back.dtype) @ back.T, back @ B.to(back.dtype), V)


def diagonal(kind: str, states: int) -> tuple[Tensor, Tensor]:
    """The poles of S4D and the B that belongs to them, complex128 ``[states / 2]``: one of each conjugate pair.

    Args:
        kind: ``"legs"``: the poles of :func:`diagonal_plus_low_rank`, whose low-rank part is dropped, and half its B:
            with more and more states, that remembers what LegS does. ``"lin"``: ``-1/2 + i pi n``; ``"inv"``:
            ``-1/2 + i (states / pi) (states / (2 n + 1) - 1)``; with B of ones.
        states: even.
    """
    _check("diagonal", "kind", kind, DIAGONALS, states, even=True)
    if kind == "legs":
        form = diagonal_plus_low_rank("legs", states)
        return form.w, form.B / 2
    n = torch.arange(states // 2, dtype=torch.float64)
    turn = math.pi * n if kind == "lin" else states / math.pi * (states / (2 * n + 1) - 1)
    w = torch.complex(torch.full_like(turn, -0.5), turn)
    return w, torch.ones_like(w)


def _fourier_ends(states: int) -> Tensor:
    """The value of each basis function at both ends of the window: 1, and sqrt(2) and 0 of each cosine and sine."""
    ends = torch.zeros(states, dtype=torch.float64)
    ends[0], ends[1::2] = 1, math.sqrt(2)
    return ends


def _fourier_turn(states: int) -> Tensor:
    """How time turns each cosine into its sine; a last cosine without a sine stands still."""
    turn = torch.zeros(states, states, dtype=torch.float64)
    cosines = 2 * torch.arange((states - 1) // 2) + 1
    rates = math.pi * (cosines + 1).double()
    turn[cosines, cosines + 1], turn[cosines + 1, cosines] = -rates, rates
    return turn


def _fourier_poles(states: int) -> tuple[Tensor, Tensor]:
    """Known in closed form, which tells apart the two that are 0: the constant and the last cosine are one pair."""
    half = states // 2
    w = 2j * math.pi * torch.arange(half, dtype=torch.float64)
    V = torch.zeros(states, half, dtype=torch.complex128)
    V[0, 0], V[states - 1, 0] = math.sqrt(0.5), 1j * math.sqrt(0.5)
    pairs = torch.arange(1, half)
    V[2 * pairs - 1, pairs], V[2 * pairs, pairs] = math.sqrt(0.5), -1j * math.sqrt(0.5)
    return w, V


def _check(what: str, name: str, value: str, known: tuple[str, ...], states: int, even: bool = False) -> None:
    if value not in known:
        raise ValueError(f"{what}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if states < 1 or (even and states % 2):
        raise ValueError(f"{what}: states must be {'even and ' if even else ''}positive, got {states}")
