"""Fused attention over packed sequences: the public function, and what torch must know of its operators."""

import torch
from torch import Tensor

from ._registration import register_autocast, register_gradient, register_without_gradient

_ALIBI_SLOPES, _SINKS = 10, 11  # their places among the operator's arguments


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    sink_tokens: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention within each sequence of a packed batch, without padding.

    Sequence ``n`` owns the rows ``cu_seqlens[n]:cu_seqlens[n + 1]``. With ``i`` and ``j`` counting its queries and
    keys, and ``i' = i + len_k - len_q`` (the last query stands level with the last key)::

        s[i, j] = cap(scale * q[i] . k[j]) - alibi_slope * |i' - j|        cap(x) = softcap * tanh(x / softcap)
        lse[i]  = log(sum_j exp(s[i, j]) + exp(sink))                      over the keys that query i sees
        out[i]  = sum_j exp(s[i, j] - lse[i]) * v[j]

    Query ``i`` sees key ``j`` when both hold:

    - not ``causal``, or ``j <= i'``
    - ``i' - left <= j <= i' + right``, or ``j < sink_tokens``

    A query that sees no key gets zeros and an lse of ``-inf`` (of its head's sink, where there are sinks). Rows after
    ``cu_seqlens[-1]`` are never read and come back as zeros. A sequence's results do not depend on what else is in
    the batch, to the last bit.

    Args:
        q: ``[total_q, heads, dim]``, float16, bfloat16 or float32 (on the CPU float64 too). On a GPU head dims are
            multiples of 8 up to 256.
        k: ``[total_k, kv_heads, dim]``. ``heads`` is a multiple of ``kv_heads``: query head ``h`` reads key head
            ``h // (heads // kv_heads)``.
        v: ``[total_k, kv_heads, dim_v]``.
        cu_seqlens: the boundaries, int32 ``[sequences + 1]`` on q's device: starts at 0, never decreases, ends within
            ``total_q``. Sequences may be empty.
        cu_seqlens_k: the boundaries of keys and values, where they differ from the queries'.
        causal: hide the keys after the query.
        window: ``(left, right)``: how many keys before and after its own place a query sees; -1 or None: all.
        sink_tokens: so many first keys of each sequence are seen outside the window too (not past ``causal``).
        softcap: bound of the scores; 0 for none.
        alibi_slopes: float32 ``[heads]``; no gradient.
        sinks: float32 ``[heads]``, a logit for each head that takes part in the denominator alone.
        scale: of the scores, ``dim ** -0.5`` by default.
        return_lse: also return ``lse``, float32 ``[total_q, heads]``, in natural logarithm, with a gradient.

    ``alibi_slopes``, ``sinks`` and ``lse`` are float64 where q is. Under autocast, q, k and v are cast to its dtype.

    Returns:
        ``out [total_q, heads, dim_v]`` in q's dtype, or ``(out, lse)``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value. What ``cu_seqlens`` holds is checked on
            the CPU, and on a GPU with ``PACKSEQ_VALIDATE=1`` in the environment, which costs a copy to the host.
        NotImplementedError: a gradient is asked for that does not exist: of ``alibi_slopes``, or a second derivative.

    The online softmax in tiles is FlashAttention's (arXiv 2205.14135, 2307.08691), attention without padding
    ByteTransformer's (2210.03052). ALiBi: 2108.12409. Windows with sink tokens: LM-Infinite's mask (2308.16137) and
    attention sinks (2309.17453).
    """
    left, right = window_limits(window)
    out, lse = torch.ops.packseq.attention(
        q, k, v, cu_seqlens, cu_seqlens_k, causal, left, right, sink_tokens, softcap, alibi_slopes, sinks, scale
    )
    return (out, lse) if return_lse else out


def window_limits(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"attention: window must be (left, right) or None, got {window!r}")
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("packseq::attention")
def _(q, k, v, cu_seqlens, *options):
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=_statistics_dtype(q))


@torch.library.register_fake("packseq::attention_backward")
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, *options):
    sinks = options[-2]
    dsinks = q.new_empty(0 if sinks is None else q.shape[1], dtype=_statistics_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


@torch.library.register_fake("packseq::attention_accumulate")
@torch.library.register_fake("packseq::attention_accumulate_backward")
@torch.library.register_fake("packseq::attention_finish")
def _(*arguments):
    return None


@torch.library.register_fake("packseq::attention_delta")
def _(dout, out, dlse=None):
    return out.new_empty(out.shape[:2], dtype=_statistics_dtype(out))


def _save(ctx, inputs, output):
    # As a slice: torch leaves out trailing arguments that are at their defaults.
    if any(ctx.needs_input_grad[_ALIBI_SLOPES : _ALIBI_SLOPES + 1]):
        raise NotImplementedError("attention: alibi_slopes has no gradient, it must not require one: detach() it")
    q, k, v, cu_seqlens, cu_seqlens_k, *options, alibi_slopes, sinks, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k, alibi_slopes, sinks)
    ctx.options, ctx.scale = options, scale


def _backward(ctx, dout, dlse):
    *tensors, cu_seqlens, cu_seqlens_k, alibi_slopes, sinks = ctx.saved_tensors
    if dout is None:  # only lse was used
        dout = torch.zeros_like(tensors[3])
    dq, dk, dv, dsinks = torch.ops.packseq.attention_backward(
        dout, dlse, *tensors, cu_seqlens, cu_seqlens_k, *ctx.options, alibi_slopes, sinks, ctx.scale
    )
    grads = [dq, dk, dv, *[None] * 10]
    grads[_SINKS] = None if sinks is None else dsinks
    return tuple(grads)


register_gradient("attention", _backward, _save)
for operator in ("attention_accumulate", "attention_accumulate_backward", "attention_finish", "attention_delta"):
    register_without_gradient(operator)
for operator in ("attention", "attention_accumulate"):
    register_autocast(operator, lambda cast, q, k, v, *rest: (cast(q), cast(k), cast(v), *rest))
register_autocast(
    "attention_accumulate_backward",
    lambda cast, dout, delta, q, k, v, *rest: (cast(dout), delta, cast(q), cast(k), cast(v), *rest),
)
