"""Attention from its formula, sequence by sequence, in plain torch: exact in float64, and as torch would do it in any
dtype, whose error is the measure of ours. Their gradients are autograd's."""

import torch
from torch import Tensor


def visible_keys(len_q: int, len_k: int, causal: bool, window, sink_tokens: int, device) -> Tensor:
    """[len_q, len_k]: whether a query sees a key."""
    i = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    j = torch.arange(len_k, device=device)[None, :]
    left, right = ((-1 if w is None else w) for w in (window or (None, None)))
    seen = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    seen |= j < sink_tokens
    if causal:
        seen &= j <= i
    return seen


def attention_of_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window=None,
    sink_tokens: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [len_q, heads, dim], k and v [len_k, kv_heads, ...] to out [len_q, heads, dim_v] and lse."""
    len_q, len_k, group = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = (q @ k.transpose(1, 2)) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        i = torch.arange(len_q, device=q.device)[:, None] + (len_k - len_q)
        distance = (i - torch.arange(len_k, device=q.device)[None, :]).abs()
        scores = scores - (alibi_slopes[:, None, None] * distance).to(scores.dtype)
    hidden = ~visible_keys(len_q, len_k, causal, window, sink_tokens, q.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    # The sink is one more key, without a value: -inf where there is none.
    sink = torch.full((q.shape[0],), -torch.inf, device=q.device) if sinks is None else sinks
    scores = torch.cat([scores, sink.to(scores.dtype)[:, None, None].expand(-1, len_q, 1)], 2)

    # Softmax and log-sum-exp whose gradients survive rows of -inf.
    wide = scores if scores.dtype == torch.float64 else scores.float()
    blind = (wide == -torch.inf).all(2, keepdim=True)
    wide = wide.masked_fill(blind, 0)
    lse = wide.logsumexp(2).masked_fill(blind[..., 0], -torch.inf)
    weights = wide.softmax(2).masked_fill(blind, 0).to(v.dtype)
    return (weights[..., :len_k] @ v).transpose(0, 1), lse.transpose(0, 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], lengths_k: list[int] | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Packed: q, k and v hold the sequences one after another, then slack rows, which come back as zeros."""
    lengths_k = lengths_k or lengths
    outs, lses = [], []
    ends_q, ends_k = torch.tensor([lengths, lengths_k]).cumsum(1).tolist() if lengths else ([], [])
    for end_q, n_q, end_k, n_k in zip(ends_q, lengths, ends_k, lengths_k, strict=True):
        rows_k = slice(end_k - n_k, end_k)
        out, lse = attention_of_one(q[end_q - n_q : end_q], k[rows_k], v[rows_k], **options)
        outs.append(out)
        lses.append(lse)
    slack = len(q) - sum(lengths)
    lse_dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    outs.append(q.new_zeros(slack, q.shape[1], v.shape[2]))
    lses.append(q.new_zeros(slack, q.shape[1], dtype=lse_dtype))
    return torch.cat(outs), torch.cat(lses)
