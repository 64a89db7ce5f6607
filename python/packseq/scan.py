"""Mamba's selective scan and its causal convolution over packed sequences: the public functions, and what torch must
know of their operators."""

import torch
from torch import Tensor

from . import _mamba_inner  # noqa: F401  (registers the operator)
from ._boundaries import one_sequence, one_token_each
from ._registration import empty_gradient, register_autocast, register_gradient, register_without_gradient, widened


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan within each sequence of a packed batch, without padding.

    Sequence ``n`` owns the rows ``cu_seqlens[n]:cu_seqlens[n + 1]``. With ``t`` counting them, for every channel and
    each of its states::

        d[t]   = softplus(delta[t] + delta_bias)               softplus where delta_softplus
        h[t]   = exp(d[t] * A) * h[t - 1] + d[t] * B[t] * u[t]
        y[t]   = sum over the states of C[t] * h[t]             twice its real part where A is complex
        out[t] = (y[t] + D * u[t]) * silu(z[t])

    ``h`` starts from the sequence's initial state, or zeros, and ends as its final state. Rows after
    ``cu_seqlens[-1]`` are never read and come back as zeros. A sequence's results do not depend on what else is in
    the batch, to the last bit.

    Args:
        u: ``[total, channels]``, float16, bfloat16 or float32 (on the CPU float64 too). Rows may be further apart than
            they are long, as in one half of a projection.
        delta: like u.
        A: ``[channels, states]``, float32 or complex64; up to 256 states.
        B: ``[total, groups, states]``, in u's dtype, or in A's where A is complex; ``groups`` divides ``channels``, and
            channel ``c`` reads group ``c // (channels // groups)``. Or the same for every token: ``[channels, states]``
            in A's dtype.
        C: like B; one may be constant and the other not.
        cu_seqlens: the boundaries, int32 ``[sequences + 1]`` on u's device: starts at 0, never decreases, ends within
            ``total``. Sequences may be empty. None: all rows are one sequence.
        D: float32 ``[channels]``.
        z: the gate, like u.
        delta_bias: float32 ``[channels]``.
        delta_softplus: apply softplus to delta (after the bias).
        initial_states: ``[sequences, channels, states]`` in A's dtype.
        return_final_states: also return the final states, with a gradient.
        reverse: scan each sequence from its last row to its first; the initial state stands after the last row then,
            and the final state is that at the first.

    With float64 u the parameters and states are float64 and complex128. Under autocast u, delta, z, B and C (but not
    constant or complex ones) are cast to its dtype.

    Returns:
        ``out [total, channels]`` in u's dtype, or ``(out, final_states)``, these like ``initial_states``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value. What ``cu_seqlens`` holds is checked on
            the CPU, and on a GPU with ``PACKSEQ_VALIDATE=1`` in the environment, which costs a copy to the host.
        NotImplementedError: a second derivative is asked for.

    The scan is Mamba's (arXiv 2312.00752), its discretisation with complex A S4's (2111.00396).
    """
    if cu_seqlens is None:
        cu_seqlens = one_sequence("selective_scan: u", u)
    out, final_states = torch.ops.packseq.selective_scan(
        *(u, delta, A, B, C, cu_seqlens, D, z, delta_bias, initial_states),
        *(delta_softplus, reverse, return_final_states),
    )
    return (out, final_states) if return_final_states else out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A causal convolution of every channel with its own short filter, within each sequence of a packed batch.

    With ``t`` counting the rows of a sequence::

        out[t] = act(bias + sum over k of weight[:, k] * x[t - (width - 1) + k])

    What stands before a sequence's first row is its initial state, or zeros. Its final state is the last
    ``width - 1`` values of initial state and rows together, the newest last. Rows after ``cu_seqlens[-1]`` are never
    read and come back as zeros. A sequence's results do not depend on what else is in the batch, to the last bit.

    Args:
        x: ``[total, channels]``, float16, bfloat16 or float32 (on the CPU float64 too).
        weight: float32 ``[channels, width]``, width 2 to 8; half types are cast to float32.
        bias: ``[channels]``, like weight.
        cu_seqlens: the boundaries, as in :func:`selective_scan`.
        activation: ``"silu"`` or None.
        initial_states: ``[sequences, channels, width - 1]`` in x's dtype.
        return_final_states: also return the final states, with a gradient.
        reverse: from each sequence's last row to its first: ``x[t + (width - 1) - k]`` in the sum.

    With float64 x everything is float64. Under autocast x and the states are cast to its dtype.

    Returns:
        ``out [total, channels]`` in x's dtype, or ``(out, final_states)``, these like ``initial_states``.

    Raises:
        ValueError, NotImplementedError: as :func:`selective_scan`.
    """
    if cu_seqlens is None:
        cu_seqlens = one_sequence("causal_conv1d: x", x)
    silu = _is_silu("causal_conv1d", activation)
    out, final_states = torch.ops.packseq.causal_conv1d(
        x, widened(weight), cu_seqlens, widened(bias), initial_states, silu, reverse, return_final_states
    )
    return (out, final_states) if return_final_states else out


def selective_scan_step(
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """:func:`selective_scan` for the next token (or few) of many sequences, whose states are updated in place.

    Args:
        states: a pool of states, ``[slots, channels, states]`` in A's dtype, contiguous. Each sequence starts from its
            slot, and leaves its final state there.
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: as in :func:`selective_scan`.
        cu_seqlens: the boundaries; None: one token for each sequence.
        indices: the slot of each sequence, int32 ``[sequences]``, no two the same. A negative one skips its sequence:
            zeros come back, and no state changes. None: sequence ``i`` has slot ``i``.

    Returns:
        ``out [total, channels]``.

    Raises:
        ValueError: as :func:`selective_scan`; what ``indices`` holds is checked where ``cu_seqlens`` is. Unchecked, a
            slot that is not there skips its sequence.
        NotImplementedError: an argument requires a gradient (outside ``torch.no_grad()``): there is none.
    """
    if cu_seqlens is None:
        cu_seqlens = one_token_each("selective_scan_step: u", u)
    return torch.ops.packseq.selective_scan_step(
        states, u, delta, A, B, C, cu_seqlens, indices, D, z, delta_bias, delta_softplus
    )


def causal_conv1d_step(
    states: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`causal_conv1d` for the next token (or few) of many sequences, whose states are updated in place.

    Args:
        states: a pool of states, ``[slots, channels, width - 1]`` in x's dtype, contiguous. Under autocast x is cast to
            their dtype.
        x, weight, bias, activation: as in :func:`causal_conv1d`.
        cu_seqlens, indices: as in :func:`selective_scan_step`.

    Returns:
        ``out [total, channels]``.

    Raises:
        ValueError, NotImplementedError: as :func:`selective_scan_step`.
    """
    if cu_seqlens is None:
        cu_seqlens = one_token_each("causal_conv1d_step: x", x)
    silu = _is_silu("causal_conv1d_step", activation)
    return torch.ops.packseq.causal_conv1d_step(states, x, widened(weight), cu_seqlens, widened(bias), indices, silu)


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    out_proj_weight: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    out_proj_bias: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """A Mamba block behind its input projection, with a backward that keeps little::

        x, z        = xz, each [total, channels]
        u           = causal_conv1d(x, conv_weight, conv_bias, cu_seqlens, activation="silu")
        dt, B, C    = u @ x_proj_weight.T
        y           = selective_scan(u, dt @ dt_proj_weight.T, A, B, C, cu_seqlens, D=D, z=z, delta_bias=dt_bias,
                                     delta_softplus=True)
        out         = y @ out_proj_weight.T + out_proj_bias

    The results are those of this composition. For the backward, of every token ``xz``, ``dt``, ``B``, ``C`` and ``y``
    are kept: ``3 * channels + dt_rank + 2 * states`` numbers; ``u`` and delta are computed again.

    Args:
        xz: ``[total, 2 * channels]``, float16, bfloat16 or float32 (on the CPU float64 too).
        conv_weight, conv_bias: as in :func:`causal_conv1d`.
        x_proj_weight: ``[dt_rank + 2 * states, channels]`` in xz's dtype.
        dt_proj_weight: ``[channels, dt_rank]`` in xz's dtype.
        out_proj_weight: ``[features, channels]`` in xz's dtype.
        A: float32 ``[channels, states]``.
        D, dt_bias: float32 ``[channels]``.
        cu_seqlens, reverse: as in :func:`selective_scan`; the convolution is reversed too.
        out_proj_bias: ``[features]`` in xz's dtype.

    Under autocast xz and the projections are cast to its dtype.

    The products are torch's, and may round a row differently where there are more rows: to the last bit, a sequence's
    results depend on the size of the batch, though not on what is in it.

    Returns:
        ``out [total, features]``; rows after the last sequence are zeros.

    Raises:
        ValueError, NotImplementedError: as :func:`selective_scan`.
    """
    if cu_seqlens is None:
        cu_seqlens = one_sequence("mamba_inner: xz", xz)
    return torch.ops.packseq.mamba_inner(
        *(xz, widened(conv_weight), widened(conv_bias), x_proj_weight, dt_proj_weight, out_proj_weight),
        *(out_proj_bias, A, D, dt_bias, cu_seqlens, reverse),
    )[0]


def _is_silu(operator: str, activation: str | None) -> bool:
    if activation not in (None, "silu"):
        raise ValueError(f'{operator}: activation must be None or "silu", got {activation!r}')
    return activation == "silu"


# ---- what comes out, without computing it


@torch.library.register_fake("packseq::selective_scan")
def _(u, delta, A, B, C, cu_seqlens, *options):
    sequences = cu_seqlens.shape[0] - 1 if options[6:] == (True,) else 0
    return u.new_empty(u.shape), A.new_empty(sequences, *A.shape)


@torch.library.register_fake("packseq::selective_scan_backward")
def _(dout, dfinal_states, u, delta, A, B, C, cu_seqlens, D, z, delta_bias, initial_states, *options):
    given = [x.new_empty(x.shape) for x in (u, delta, A, B, C)]
    optional = [empty_gradient(x, like=u) for x in (D, z, delta_bias)]
    return *given, *optional, empty_gradient(initial_states, like=A)


@torch.library.register_fake("packseq::causal_conv1d")
def _(x, weight, cu_seqlens, *options):
    sequences = cu_seqlens.shape[0] - 1 if options[4:] == (True,) else 0
    return x.new_empty(x.shape), x.new_empty(sequences, weight.shape[0], weight.shape[1] - 1)


@torch.library.register_fake("packseq::causal_conv1d_backward")
def _(dout, dfinal_states, x, weight, cu_seqlens, bias, initial_states, silu, reverse):
    dinitial_states = empty_gradient(initial_states, like=x)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), empty_gradient(bias, like=weight), dinitial_states


@torch.library.register_fake("packseq::selective_scan_step")
@torch.library.register_fake("packseq::causal_conv1d_step")
def _(states, rows, *rest):
    return rows.new_empty(rows.shape)


# ---- gradients


def _save_scan(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.returns_states = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _scan_backward(ctx, dout, dfinal_states):
    tensors = ctx.saved_tensors
    if dout is None:  # only the final states were used
        dout = _no_gradient(tensors[0])
    grads = torch.ops.packseq.selective_scan_backward(
        dout, dfinal_states if ctx.returns_states else None, *tensors, ctx.delta_softplus, ctx.reverse
    )
    du, ddelta, dA, dB, dC, *optional = grads
    optional = [None if x is None else grad for x, grad in zip(tensors[6:], optional, strict=True)]
    return du, ddelta, dA, dB, dC, None, *optional, None, None, None


def _save_conv1d(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse, ctx.returns_states = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _conv1d_backward(ctx, dout, dfinal_states):
    x, _, _, bias, initial_states = ctx.saved_tensors
    if dout is None:
        dout = _no_gradient(x)
    dx, dweight, dbias, dinitial_states = torch.ops.packseq.causal_conv1d_backward(
        dout, dfinal_states if ctx.returns_states else None, *ctx.saved_tensors, ctx.silu, ctx.reverse
    )
    dbias = None if bias is None else dbias
    dinitial_states = None if initial_states is None else dinitial_states
    return dx, dweight, None, dbias, dinitial_states, None, None, None


def _no_gradient(rows: Tensor) -> Tensor:
    return rows.new_zeros(1, rows.shape[1]).expand(rows.shape)


register_gradient("selective_scan", _scan_backward, _save_scan)
register_gradient("causal_conv1d", _conv1d_backward, _save_conv1d)
register_without_gradient("selective_scan_step")
register_without_gradient("causal_conv1d_step")

# ---- autocast


def _per_token(cast, x: Tensor) -> Tensor:
    return cast(x) if x.dim() == 3 else x  # constant B and C are parameters


def _cast_scan(cast, u, delta, A, B, C, cu_seqlens, D=None, z=None, *rest):
    return cast(u), cast(delta), A, _per_token(cast, B), _per_token(cast, C), cu_seqlens, D, cast(z), *rest


def _cast_scan_step(cast, states, u, delta, A, B, C, cu_seqlens, indices=None, D=None, z=None, *rest):
    B, C = _per_token(cast, B), _per_token(cast, C)
    return states, cast(u), cast(delta), A, B, C, cu_seqlens, indices, D, cast(z), *rest


def _cast_conv1d(cast, x, weight, cu_seqlens, bias=None, initial_states=None, *rest):
    return cast(x), weight, cu_seqlens, bias, cast(initial_states), *rest


def _cast_conv1d_step(cast, states, x, *rest):
    x = x.to(states.dtype) if x.is_floating_point() else x  # the states cannot be cast: they are updated in place
    return states, x, *rest


register_autocast("selective_scan", _cast_scan)
register_autocast("selective_scan_step", _cast_scan_step)
register_autocast("causal_conv1d", _cast_conv1d)
register_autocast("causal_conv1d_step", _cast_conv1d_step)
