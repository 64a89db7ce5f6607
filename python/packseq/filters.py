"""Filters of state space models: the sums they are made of, and S4's and S4D's filters; the public functions, and what
torch must know of their operators."""

import torch
from torch import Tensor

from ._registration import empty_gradient, register_gradient, widened

# ---- sums


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Sums of simple fractions, at every node::

        out[..., l] = sum over n of v[..., n] / (z[l] - w[..., n])

    Args:
        v: ``[*groups, *rows, N]``, complex64, or complex128 on the CPU. Its last dimensions are w's; what stands before
            them shares one w, which costs less than a call each.
        z: ``[L]``, like v: the nodes, anywhere but on a pole.
        w: ``[*rows, N]``, like v: the poles, 1 to 1024 of them.

    Returns:
        ``[*groups, *rows, L]``, like v. Every argument has a gradient, z too.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: a second derivative is asked for.

    Source: Gu et al., arXiv 2111.00396.
    """
    return torch.ops.packseq.cauchy(v, z, w)


def cauchy_conj(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """:func:`cauchy` where each term stands for itself and its conjugate: ``v / (z - w) + conj(v) / (z - conj(w))``.

    N counts pairs: v and w hold one of each, and real poles with half of their v.
    """
    return torch.ops.packseq.cauchy(v, z, w, True)


def vandermonde(v: Tensor, x: Tensor, length: int) -> Tensor:
    """Sums of exponentials, at every step::

        out[..., l] = sum over n of v[..., n] * exp(x[..., n] * l),     l = 0 .. length - 1

    x is the logarithm of what a Vandermonde matrix holds powers of, so that no power overflows on the way; phases stay
    right to float32's precision however large l is.

    Args:
        v: ``[*groups, *rows, N]``, complex64, or complex128 on the CPU; its last dimensions are x's, as in
            :func:`cauchy`.
        x: ``[*rows, N]``, like v; N is 1 to 1024.
        length: 1 or more.

    Returns:
        ``[*groups, *rows, length]``, like v.

    Raises:
        ValueError, NotImplementedError: as :func:`cauchy`.
    """
    return torch.ops.packseq.vandermonde(v, x, length)


def vandermonde_conj(v: Tensor, x: Tensor, length: int) -> Tensor:
    """:func:`vandermonde` where each term stands for itself and its conjugate: twice the real part, in a real dtype."""
    return torch.ops.packseq.vandermonde(v, x, length, True)


def vandermonde_transpose(u: Tensor, x: Tensor) -> Tensor:
    """The transpose of :func:`vandermonde`, from steps to modes::

        out[..., n] = sum over l of u[..., l] * exp(x[..., n] * l)

    With u reversed in time it is the state that a diagonal model is left in.

    Args:
        u: ``[*groups, *rows, L]``, complex like x or real of the same precision; L is 1 or more.
        x: ``[*rows, N]``, complex64, or complex128 on the CPU; N is 1 to 1024.

    Returns:
        ``[*groups, *rows, N]``, like x.

    Raises:
        ValueError, NotImplementedError: as :func:`cauchy`.
    """
    return torch.ops.packseq.vandermonde_transpose(u, x)


# ---- filters


def s4_filter(w: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, P: Tensor | None = None) -> Tensor:
    """S4's filter, of a model with a diagonal plus low-rank state matrix ``A = diag(w) - P P^*``, by the bilinear
    transform::

        k[l] = Cbar Abar^l Bbar,     C = Cbar (I - Abar^length)

    computed on the unit circle: the four Cauchy sums, the Woodbury correction and their factors in one kernel, then an
    inverse real Fourier transform. w, P, B and C hold one of each conjugate pair.

    Args:
        w: ``[channels, N]``, complex64, or complex128 on the CPU, 1 to 1024 pairs; real parts must not be positive.
        B: like w.
        C: ``[channels, N]``, or ``[filters, channels, N]`` where several filters share the rest. Not the model's own
            ``Cbar``, which :func:`s4_step` takes: this is the "C tilde" that S4 learns in its stead.
        dt: ``[channels]``, float32 (float64 with complex128), positive.
        length: of the filter, 1 or more.
        P: ``[rank, channels, N]``, like w, rank 1 or 2. None: A is diagonal.

    Returns:
        ``[channels, length]`` or ``[filters, channels, length]``, real.

    Raises:
        ValueError, NotImplementedError: as :func:`cauchy`.

    Source: Gu et al., arXiv 2111.00396, appendix C.3.
    """
    spectrum = torch.ops.packseq.s4_spectrum(w, B, C, widened(dt), length, P)
    if C.numel() == 0:  # which not every library of transforms takes
        return spectrum.real[..., :1].expand(*C.shape[:-1], length)
    return _InverseTransform.apply(spectrum, length)


def s4d_modes(A: Tensor, B: Tensor, dt: Tensor, *, discretization: str = "zoh") -> tuple[Tensor, Tensor]:
    """A diagonal model's modes at discrete steps: ``(log(Abar), Bbar)``, each ``[channels, N]``.

    With its C they are what :func:`long_conv` takes as ``modes``. See :func:`s4d_filter` for the arguments.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or ``discretization`` is neither of the two.
    """
    dt = widened(dt)
    _check_diagonal("s4d_modes", A, B, dt, discretization)
    return _modes(A, B, dt, discretization)


def s4d_filter(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, *, discretization: str = "zoh") -> Tensor:
    """The filter of a model with a diagonal state matrix (S4D, DSS)::

        k[l] = 2 Re sum over n of C[n] * Bbar[n] * Abar[n]^l

    by zero-order hold, ``Abar = exp(dt A)``, ``Bbar = (Abar - 1) / A * B``, or by the bilinear transform,
    ``Abar = (1 + dt A / 2) / (1 - dt A / 2)``, ``Bbar = dt B / (1 - dt A / 2)``. A, B and C hold one of each conjugate
    pair.

    Args:
        A: ``[channels, N]``, complex64, or complex128 on the CPU, 1 to 1024 pairs.
        B: like A.
        C: ``[channels, N]``, or ``[filters, channels, N]`` where several filters share the rest.
        dt: ``[channels]``, float32 (float64 with complex128), positive.
        length: of the filter, 1 or more.
        discretization: ``"zoh"`` or ``"bilinear"``.

    Returns:
        ``[channels, length]`` or ``[filters, channels, length]``, real.

    Raises:
        ValueError, NotImplementedError: as :func:`cauchy`.

    Sources: Gu et al., arXiv 2206.11893; Gupta et al., 2203.14343.
    """
    dt = widened(dt)
    _check_diagonal("s4d_filter", A, B, dt, discretization)
    if C.dim() not in (2, 3):
        raise ValueError(
            f"s4d_filter: C must be [channels, poles] or [filters, channels, poles], got shape {list(C.shape)}"
        )
    _check_like_A("s4d_filter: C", C, (*C.shape[:-2], *A.shape), A)
    if length < 1:
        raise ValueError(f"s4d_filter: length must be 1 or more, got {length}")
    x, B = _modes(A, B, dt, discretization)
    return vandermonde_conj(C * B, x, length)


_MOST_POLES = 1024


def _check_diagonal(operator: str, A: Tensor, B: Tensor, dt: Tensor, discretization: str) -> None:
    if discretization not in ("zoh", "bilinear"):
        raise ValueError(f'{operator}: discretization must be "zoh" or "bilinear", got {discretization!r}')
    if A.dim() != 2:
        raise ValueError(f"{operator}: A must be [channels, poles], got shape {list(A.shape)}")
    if A.dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"{operator}: A must be complex64 or complex128, got {_name(A.dtype)}")
    if not 1 <= A.shape[1] <= _MOST_POLES:
        raise ValueError(f"{operator}: A must have between 1 and {_MOST_POLES} poles, got {A.shape[1]}")
    _check_like_A(f"{operator}: B", B, tuple(A.shape), A)
    real = torch.float32 if A.dtype == torch.complex64 else torch.float64  # torch.compile takes no dtype.to_real()
    _check_like_A(f"{operator}: dt", dt, (A.shape[0],), A, real)


def _check_like_A(what: str, x: Tensor, shape: tuple[int, ...], A: Tensor, dtype: torch.dtype | None = None) -> None:
    if x.shape != shape:
        raise ValueError(f"{what} must have shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != (dtype or A.dtype):
        of = f"{_name(A.dtype)} like A" if dtype is None else _name(dtype)
        raise ValueError(f"{what} must be {of}, got {_name(x.dtype)}")
    if x.device != A.device:
        raise ValueError(f"{what} must be on {A.device} like A, got {x.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _modes(A: Tensor, B: Tensor, dt: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    step = dt[:, None]
    x = step * A
    if discretization == "zoh":
        return x, step * B * _expm1_ratio(x)
    return _log_bilinear(x / 2), step * B / (1 - x / 2)


class _InverseTransform(torch.autograd.Function):
    """torch.fft.irfft, whose own derivative doubles a slice in place: inductor (torch 2.13) loses that beside other
    complex gradients."""

    @staticmethod
    def forward(ctx, spectrum: Tensor, length: int) -> Tensor:
        ctx.length = length
        return torch.fft.irfft(spectrum, n=length)

    @staticmethod
    def backward(ctx, dk: Tensor) -> tuple[Tensor, None]:
        dspectrum = torch.fft.rfft(dk, norm="forward")
        bins = torch.arange(dspectrum.shape[-1], device=dk.device)
        of_two = (bins > 0) & (2 * bins < ctx.length)  # frequencies that stand for their conjugates too
        return dspectrum * (1 + of_two.to(dk.dtype)), None


_SMALL = 2.0**-5  # where the series below has float64's precision, and its derivative does not cancel


def _log_bilinear(x: Tensor) -> Tensor:
    """log((1 + x) / (1 - x)) without cancelling, by real functions: complex ones are not accurate near 0 on every
    device."""
    sign = torch.where(x.real < 0, -1, 1)
    real = sign * x.real
    gain = 0.5 * sign * torch.log1p(4 * real / ((1 - real).square() + x.imag.square()))
    return torch.complex(gain, torch.atan2(x.imag, 1 + x.real) + torch.atan2(x.imag, 1 - x.real))


def _expm1_ratio(x: Tensor) -> Tensor:
    """``(exp(x) - 1) / x``, 1 at 0."""
    small = x.abs() < _SMALL
    near, far = torch.where(small, x, 0), torch.where(small, 1, x)
    series = torch.ones_like(near)
    for n in range(9, 1, -1):
        series = 1 + near / n * series
    return torch.where(small, series, torch.expm1(far) / far)


# ---- what comes out, without computing it


@torch.library.register_fake("packseq::cauchy")
def _(v, z, w, conjugate=False):
    return v.new_empty(*v.shape[:-1], z.shape[0])


@torch.library.register_fake("packseq::cauchy_backward")
def _(dout, v, z, w, conjugate, wants_dz):
    return v.new_empty(v.shape), empty_gradient(z if wants_dz else None, like=w), w.new_empty(w.shape)


@torch.library.register_fake("packseq::vandermonde")
def _(v, x, length, conjugate=False):
    return v.new_empty(*v.shape[:-1], length, dtype=x.dtype.to_real() if conjugate else x.dtype)


@torch.library.register_fake("packseq::vandermonde_backward")
def _(dout, v, x, length, conjugate):
    return v.new_empty(v.shape), x.new_empty(x.shape)


@torch.library.register_fake("packseq::vandermonde_transpose")
def _(u, x):
    return x.new_empty(*u.shape[:-1], x.shape[-1])


@torch.library.register_fake("packseq::vandermonde_transpose_backward")
def _(dout, u, x):
    return u.new_empty(u.shape), x.new_empty(x.shape)


@torch.library.register_fake("packseq::s4_spectrum")
def _(w, B, C, dt, length, P=None):
    return w.new_empty(*C.shape[:-1], length // 2 + 1)


@torch.library.register_fake("packseq::s4_spectrum_backward")
def _(dout, w, B, C, dt, length, P):
    return *(x.new_empty(x.shape) for x in (w, B, C, dt)), empty_gradient(P, like=w)


# ---- gradients


def _save_cauchy(ctx, inputs, output):
    *tensors, ctx.conjugate = inputs
    ctx.save_for_backward(*tensors)


def _cauchy_backward(ctx, dout):
    wants_dz = ctx.needs_input_grad[1]  # S4's nodes are fixed, and dz is a sum over everything
    dv, dz, dw = torch.ops.packseq.cauchy_backward(dout, *ctx.saved_tensors, ctx.conjugate, wants_dz)
    return dv, dz if wants_dz else None, dw, None


def _save_vandermonde(ctx, inputs, output):
    *tensors, ctx.length, ctx.conjugate = inputs
    ctx.save_for_backward(*tensors)


def _vandermonde_backward(ctx, dout):
    dv, dx = torch.ops.packseq.vandermonde_backward(dout, *ctx.saved_tensors, ctx.length, ctx.conjugate)
    return dv, dx, None, None


def _save_transpose(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _transpose_backward(ctx, dout):
    return torch.ops.packseq.vandermonde_transpose_backward(dout, *ctx.saved_tensors)


def _save_spectrum(ctx, inputs, output):
    w, B, C, dt, ctx.length, P = inputs
    ctx.save_for_backward(w, B, C, dt, P)


def _spectrum_backward(ctx, dout):
    *tensors, P = ctx.saved_tensors
    *grads, dP = torch.ops.packseq.s4_spectrum_backward(dout, *tensors, ctx.length, P)
    return *grads, None, None if P is None else dP


register_gradient("cauchy", _cauchy_backward, _save_cauchy)
register_gradient("vandermonde", _vandermonde_backward, _save_vandermonde)
register_gradient("vandermonde_transpose", _transpose_backward, _save_transpose)
register_gradient("s4_spectrum", _spectrum_backward, _save_spectrum)
