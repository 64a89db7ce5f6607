"""The long convolution over packed sequences and S4's recurrence, token by token: the public functions, and what torch
must know of their operators."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._boundaries import one_sequence, one_token_each, slack_rows
from ._registration import empty_gradient, register_autocast, register_gradient, register_without_gradient, widened
from .scan import selective_scan

_MOST_MODES = 256  # the scan's states


def long_conv(
    u: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    D: Tensor | None = None,
    pre_gate: Tensor | None = None,
    gate: Tensor | None = None,
    k_after: Tensor | None = None,
    reverse: bool = False,
    modes: tuple[Tensor, Tensor, Tensor] | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A convolution of every channel with a filter as long as the sequence, within each sequence of a packed batch.

    With ``t`` counting the rows of a sequence, and what lies outside it zero::

        x[t]   = pre_gate[t] * u[t]
        y[t]   = sum over j >= 0 of k[j] * x[t - j]  +  D * x[t]
               + sum over j >= 0 of k_after[j] * x[t + 1 + j]
        out[t] = gate[t] * y[t]

    by Fourier transforms, each sequence on its own and sized by its own length. In sequences of 64 rows or fewer the
    sum is taken directly, so that a row there exactly leaves alone those before it; in longer ones within rounding.
    Rows after ``cu_seqlens[-1]`` are never read and come back as zeros. A sequence's results do not depend on what else
    is in the batch, to the last bit.

    Args:
        u: ``[total, channels]``, float16, bfloat16 or float32 (on the CPU float64 too). Rows may be further apart than
            they are long.
        k: float32 ``[channels, K]``, the newest row's tap first; longer or shorter than the sequences. Half types are
            cast to float32.
        cu_seqlens: the boundaries, as in :func:`selective_scan`.
        D: ``[channels]``, like k: the skip.
        pre_gate, gate: like u.
        k_after: ``[channels, K_after]``, like k: the filter of rows that are yet to come, which makes the convolution
            bidirectional.
        reverse: from each sequence's last row to its first: t counts from its end.
        modes: ``(x, B, C)``, each complex64 ``[channels, N]``, N up to 256: what k is made of,
            ``k[l] = 2 Re sum over n of C B exp(x l)``, as by :func:`s4d_modes`. Asked for where there are states.
        initial_states: complex64 ``[sequences, channels, N]``: the states ``h[t] = exp(x) * h[t - 1] + B * x[t]`` that
            the sequences start from, as if what led there stood before them. None: zeros.
        return_final_states: also return the states after the last rows, with a gradient.

    With float64 u everything else is float64 or complex128. Under autocast u and the gates are cast to its dtype.

    The outputs with initial states are the convolution's plus what the states add, so that a sequence can be convolved
    in parts, or convolved and then continued by :func:`s4_step`; k must be as long as the sequences then.

    Returns:
        ``out [total, channels]`` in u's dtype, or ``(out, final_states)``, these like ``initial_states``.

    Raises:
        ValueError, NotImplementedError: as :func:`selective_scan`.

    Sources: Gu et al., arXiv 2111.00396 (filters as long as the sequence); Fu et al., 2212.14052 (gates).
    """
    if cu_seqlens is None:
        cu_seqlens = one_sequence("long_conv: u", u)
    out = torch.ops.packseq.long_conv(u, widened(k), cu_seqlens, widened(D), pre_gate, gate, widened(k_after), reverse)
    if initial_states is None and not return_final_states:
        return out
    check_modes(modes, u, k_after)
    with _without_autocast(u.device):
        # As the operator saw them, but for rows that are nobody's: NaN must not come from there.
        slack = slack_rows(cu_seqlens, u.shape[0])[:, None]
        u, pre_gate, gate = (
            None if x is None else wide(x.to(out.dtype).masked_fill(slack, 0)) for x in (u, pre_gate, gate)
        )
        of_model = {"cu_seqlens": cu_seqlens, "initial_states": initial_states, "reverse": reverse}
        if initial_states is not None:
            response = scan_modes(torch.zeros_like(u[:1]).expand(u.shape), modes, **of_model)[0]
            response = response if gate is None else gate * response
            out = (wide(out) + response).to(out.dtype)
        if not return_final_states:
            return out
        return out, scan_modes(u if pre_gate is None else pre_gate * u, modes, **of_model)[1]


def s4_step(
    states: Tensor,
    u: Tensor,
    w: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    P: Tensor | None = None,
    D: Tensor | None = None,
    discretization: str = "bilinear",
    indices: Tensor | None = None,
) -> Tensor:
    """The recurrence whose filter :func:`s4_filter` (or :func:`s4d_filter`) is, for the next token (or few) of many
    sequences, whose states are updated in place::

        h[t]   = Abar h[t - 1] + Bbar u[t]
        out[t] = 2 Re sum over n of C[n] * h[t][n]  +  D * u[t]

    with Abar and Bbar of ``A = diag(w) - P P^*``, in N operations a token. w, P, B and C hold one of each conjugate
    pair.

    Args:
        states: a pool of states, ``[slots, channels, N]``, complex64, contiguous. Each sequence starts from its slot,
            and leaves its final state there.
        u: ``[total, channels]``, float16, bfloat16 or float32 (on the CPU float64 too).
        w: ``[channels, N]``, complex64, 1 to 1024 pairs.
        B: like w.
        C: ``[channels, N]`` or ``[filters, channels, N]``: the model's own. Where the filter came from
            :func:`s4_filter`'s C, this is ``C (I - Abar^length)^-1``.
        dt: ``[channels]``, float32, positive.
        cu_seqlens: the boundaries, as in :func:`selective_scan`; None: one token for each sequence.
        P: ``[rank, channels, N]``, like w, rank 1 or 2. None: A is diagonal.
        D: ``[channels]`` or ``[filters, channels]``, as C is, float32.
        discretization: ``"bilinear"``, or ``"zoh"`` where P is None.
        indices: the slot of each sequence, int32 ``[sequences]``, no two the same. A negative one skips its
            sequence: zeros come back, and no state changes. None: sequence ``i`` has slot ``i``.

    With float64 u parameters and states are float64 and complex128. Under autocast u is cast to its dtype.

    Returns:
        ``out [total, channels]``, or ``[total, filters, channels]`` where C has filters, in u's dtype.

    Raises:
        ValueError, NotImplementedError: as :func:`selective_scan_step`.

    Source: Gu et al., arXiv 2111.00396, appendix C.2.
    """
    if discretization not in ("bilinear", "zoh"):
        raise ValueError(f's4_step: discretization must be "bilinear" or "zoh", got {discretization!r}')
    if cu_seqlens is None:
        cu_seqlens = one_token_each("s4_step: u", u)
    zoh = discretization == "zoh"
    return torch.ops.packseq.s4_step(states, u, w, B, C, widened(dt), cu_seqlens, indices, P, widened(D), zoh)


# ---- states of the long convolution


def check_modes(modes: tuple[Tensor, Tensor, Tensor] | None, u: Tensor, k_after: Tensor | None) -> None:
    if k_after is not None:
        raise ValueError("long_conv: k_after must be None where there are states: outputs would wait for rows to come")
    if modes is None:
        raise ValueError("long_conv: modes must be given where there are states, got None")
    dtype = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    if len(modes) != 3:
        raise ValueError(f"long_conv: modes must be (x, B, C), got {len(modes)} tensors")
    for name, x in zip(("x", "B", "C"), modes, strict=True):
        if x.dim() != 2 or x.shape != modes[0].shape or x.shape[0] != u.shape[1] or not 1 <= x.shape[1] <= _MOST_MODES:
            raise ValueError(
                f"long_conv: modes must have shape [{u.shape[1]}, N], N the same for all and at most {_MOST_MODES}, "
                f"got {list(x.shape)} as {name}"
            )
        if x.dtype != dtype or x.device != u.device:
            raise ValueError(f"long_conv: modes must be {dtype} on {u.device}, got {x.dtype} on {x.device} as {name}")


def scan_modes(x: Tensor, modes: tuple[Tensor, Tensor, Tensor], **options) -> tuple[Tensor, Tensor]:
    """The recurrence that the modes are, from the initial states: outputs and final states."""
    ones = torch.ones_like(x[:1]).expand(x.shape)
    return selective_scan(x, ones, *modes, return_final_states=True, **options)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _without_autocast(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


# ---- what comes out, without computing it


@torch.library.register_fake("packseq::long_conv")
def _(u, *rest):
    return u.new_empty(u.shape)


@torch.library.register_fake("packseq::long_conv_backward")
def _(dout, u, k, cu_seqlens, D, pre_gate, gate, k_after, reverse):
    dD, dk_after = (empty_gradient(x, like=k) for x in (D, k_after))
    dpre_gate, dgate = (empty_gradient(x, like=u) for x in (pre_gate, gate))
    return u.new_empty(u.shape), k.new_empty(k.shape), dD, dpre_gate, dgate, dk_after


@torch.library.register_fake("packseq::s4_step")
def _(states, u, w, B, C, *rest):
    return u.new_empty(u.shape[0], *C.shape[:-1])


# ---- gradients


def _save_long_conv(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _long_conv_backward(ctx, dout):
    tensors = ctx.saved_tensors
    du, dk, *optional = torch.ops.packseq.long_conv_backward(dout, *tensors, ctx.reverse)
    optional = [None if x is None else grad for x, grad in zip(tensors[3:], optional, strict=True)]
    return du, dk, None, *optional, None


register_gradient("long_conv", _long_conv_backward, _save_long_conv)
register_without_gradient("s4_step")

# ---- autocast


def _cast_long_conv(cast, u, k, cu_seqlens, D=None, pre_gate=None, gate=None, *rest):
    return cast(u), k, cu_seqlens, D, cast(pre_gate), cast(gate), *rest


def _cast_s4_step(cast, states, u, *rest):
    return states, cast(u), *rest


register_autocast("long_conv", _cast_long_conv)
register_autocast("s4_step", _cast_s4_step)
