"""Filters, long convolution and S4's recurrence in plain torch, from their formulas: exact in float64, and in any other
dtype what packseq is compared with."""

import math

import torch
from scan_reference import of_rows, sequences_of, wide
from torch import Tensor

# ---- filters, at some of their nodes, steps or frequencies (so that long ones can be taken in parts)


def cauchy(z: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return (v[..., None] / (z - w[..., None])).sum(-2)


def cauchy_conj(z: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return cauchy(z, v, w) + cauchy(z, v.conj(), w.conj())


def vandermonde(steps: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return (v[..., None] * torch.exp(x[..., None] * steps)).sum(-2)


def vandermonde_conj(steps: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return 2 * vandermonde(steps, v, x).real


def vandermonde_transpose(steps: Tensor, u: Tensor, x: Tensor) -> Tensor:
    return (u[..., None, :] * torch.exp(x[..., None] * steps)).sum(-1)


def s4_spectrum(theta: Tensor, w: Tensor, B: Tensor, C: Tensor, dt: Tensor, P: Tensor | None = None) -> Tensor:
    """Appendix C.3 of arXiv 2111.00396; with 2 / (1 + o) multiplied out, it has a value at o = -1 too."""
    o = torch.exp(-1j * theta)
    resolvent = (1 / (2 * (1 - o) - (dt[:, None] * w)[..., None] * (1 + o)))[..., None, :] * dt[:, None, None, None]
    conjugate = (1 / (2 * (1 - o) - (dt[:, None] * w.conj())[..., None] * (1 + o)))[..., None, :]
    conjugate = conjugate * dt[:, None, None, None]

    def r(a: Tensor, b: Tensor) -> Tensor:
        """Sums [..., channels, frequencies]; without the factor 1 + o."""
        both = (a * b)[..., None] * resolvent[..., 0, :] + (a * b).conj()[..., None] * conjugate[..., 0, :]
        return both.sum(-2)

    out = r(B, C)
    if P is not None:
        rank = len(P)
        inner = torch.stack(
            [torch.stack([(1 + o) * r(P[i].conj(), P[j]) for j in range(rank)], -1) for i in range(rank)], -2
        )
        inner = inner + torch.eye(rank, dtype=inner.dtype, device=inner.device)
        left = torch.stack([r(P[j], C) for j in range(rank)], -1)  # [..., channels, frequencies, rank]
        right = torch.stack([r(B, P[i].conj()) for i in range(rank)], -1)
        out = out - (1 + o) * (left * torch.linalg.solve(inner, right)).sum(-1)
    return 2 * out


# ---- the dense model that a filter stands for


def dense_model(w: Tensor, B: Tensor, dt: Tensor, P: Tensor | None, zoh: bool = False) -> tuple[Tensor, Tensor]:
    """Abar [channels, 2 N, 2 N] and Bbar [channels, 2 N] over both of each conjugate pair."""
    both = torch.cat([w, w.conj()], -1)
    A, b = torch.diag_embed(both), torch.cat([B, B.conj()], -1)
    if P is not None:
        full = torch.cat([P, P.conj()], -1)
        A = A - torch.einsum("rcn,rcm->cnm", full, full.conj())
    if zoh:  # of diagonal models
        step = dt[:, None] * both
        return torch.diag_embed(torch.exp(step)), torch.expm1(step) / both * b
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    step = dt[:, None, None] * A
    left = eye - step / 2
    return torch.linalg.solve(left, eye + step / 2), torch.linalg.solve(left, dt[:, None] * b)


def dense_filter(Abar: Tensor, Bbar: Tensor, C: Tensor, length: int) -> Tensor:
    """C Abar^l Bbar for l < length."""
    both, h, taps = torch.cat([C, C.conj()], -1), Bbar, []
    for _ in range(length):
        taps.append((both * h).sum(-1).real)
        h = (Abar @ h[..., None])[..., 0]
    return torch.stack(taps, -1)


def c_tilde(Abar: Tensor, C: Tensor, length: int) -> Tensor:
    """C (I - Abar^length), one of each pair."""
    both = torch.cat([C, C.conj()], -1)
    power = torch.linalg.matrix_power(Abar, length)
    return (both - (both[..., None, :] @ power)[..., 0, :])[..., : C.shape[-1]]


# ---- convolution

DIRECT = 64


def convolve(x: Tensor, k: Tensor) -> Tensor:
    """x [length, channels] with k [channels, taps], causally."""
    length = len(x)
    if length <= DIRECT:
        shifts = range(min(length, k.shape[1]))
        zeros = torch.zeros_like(x)
        return sum((k[:, j] * torch.cat([zeros[:j], x[: length - j]]) for j in shifts), zeros)
    n = 2 ** math.ceil(math.log2(2 * length))
    product = torch.fft.rfft(x, n, dim=0) * torch.fft.rfft(k[:, :length].t(), n, dim=0)
    return torch.fft.irfft(product, n, dim=0)[:length]


def long_conv(
    u: Tensor,
    k: Tensor,
    *,
    lengths,
    D: Tensor | None = None,
    pre_gate: Tensor | None = None,
    gate: Tensor | None = None,
    k_after: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor]:
    """Packed: the sequences one after another, then slack rows, which come back as zeros."""
    dtype = u.dtype
    u, pre_gate, gate = (wide(x) for x in (u, pre_gate, gate))
    outs = []
    for _, rows in sequences_of(lengths):
        x = u[rows] if pre_gate is None else pre_gate[rows] * u[rows]
        skip = 0 if D is None else of_rows(D, 1, rows) * x
        if len(x) > 0:
            x = x.flip(0) if reverse else x
            y = convolve(x, k)
            if k_after is not None:
                after = convolve(x.flip(0), k_after)[: len(x) - 1].flip(0)
                y = y + torch.cat([after, torch.zeros_like(x[:1])])
            x = y.flip(0) if reverse else y
        y = x + skip
        outs.append((y if gate is None else gate[rows] * y).to(dtype))
    outs.append(torch.zeros(len(u) - sum(lengths), u.shape[1], dtype=dtype, device=u.device))
    return (torch.cat(outs),)


# ---- recurrence


def s4_step(
    states: Tensor,
    u: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    *,
    lengths,
    P: Tensor | None = None,
    D: Tensor | None = None,
    zoh: bool = False,
) -> tuple[Tensor, Tensor]:
    """Token by token with the dense model: out and the states [sequences, channels, N] afterwards."""
    Abar, Bbar = dense_model(w, B, dt, P, zoh)
    both = torch.cat([C, C.conj()], -1)
    outs, finals = [], []
    for i, rows in sequences_of(lengths):
        h = torch.cat([states[i], states[i].conj()], -1)
        for x in wide(u[rows]):
            h = (Abar @ h[..., None])[..., 0] + Bbar * x[:, None]
            y = (both * h).sum(-1).real
            outs.append(y if D is None else y + D * x)
        finals.append(h[:, : w.shape[1]])
    empty = torch.zeros(0, *C.shape[:-1], dtype=dt.dtype, device=u.device)
    out = torch.cat([empty, *(y[None] for y in outs)])
    return out.to(u.dtype), torch.cat([states[:0], *(h[None] for h in finals)])
