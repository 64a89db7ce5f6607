"""Attention from its formula, sequence by sequence, in plain torch: exact in float64, and as torch would do it in any
dtype, whose error is the measure of ours. Their gradients are autograd's."""

from collections.abc import Iterator

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


def softmax_of_one(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window=None,
    sink_tokens: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence, q and k [len, heads, dim]: the weights [heads, len_q, len_k], and lse [heads, len_q]."""
    len_q, len_k = len(q), len(k)
    q, k = q.transpose(0, 1), k.transpose(0, 1)
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
    return wide.softmax(2).masked_fill(blind, 0).to(q.dtype)[..., :len_k], lse


def sequences_of(
    q: Tensor, k: Tensor, v: Tensor, lengths, lengths_k=None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Each sequence's rows of q, and its q, k and v, with a key head for each query head."""
    group = q.shape[1] // k.shape[1]
    begin = begin_k = 0
    for n, n_k in zip(lengths, lengths_k or lengths, strict=True):
        rows, rows_k = slice(begin, begin + n), slice(begin_k, begin_k + n_k)
        yield rows, q[rows], k[rows_k].repeat_interleave(group, 1), v[rows_k].repeat_interleave(group, 1)
        begin, begin_k = begin + n, begin_k + n_k


def attention(q: Tensor, k: Tensor, v: Tensor, lengths, lengths_k=None, **options) -> tuple[Tensor, Tensor]:
    """Packed: q, k and v hold the sequences one after another, then slack rows, which come back as zeros."""
    outs, lses = [], []
    for _, q_i, k_i, v_i in sequences_of(q, k, v, lengths, lengths_k):
        weights, lse = softmax_of_one(q_i, k_i, **options)
        outs.append((weights @ v_i.transpose(0, 1)).transpose(0, 1))
        lses.append(lse.t())
    slack = len(q) - sum(lengths)
    lse_dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    outs.append(q.new_zeros(slack, q.shape[1], v.shape[2]))
    lses.append(q.new_zeros(slack, q.shape[1], dtype=lse_dtype))
    return torch.cat(outs), torch.cat(lses)


def rounding(
    tensors: dict[str, Tensor],
    dout: Tensor,
    dlse: Tensor,
    lengths,
    lengths_k=None,
    *,
    ulp: float,
    ulp_of_out: float,
    **options,
) -> dict[str, float]:
    """What rounding alone may do to results, where plain torch is spared it: it sums dot products of few rows in many
    parts, and keeps the softmax for the backward.

    Tensors are float64, `ulp` is that of the arithmetic and of lse, `ulp_of_out` that of out. A dot product of n terms
    summed in order is off by some sqrt(n) / 5 ulps of the terms' norm, three times that at worst: so are scores and
    lse. Weights come again from lse: its rounding is the "relative" error of gradients. dq and dk sum weight *
    (dout . v - delta): where the two are nearly equal (one key), the rounding of dout . v is left. dsinks sums the
    sink's weight * delta over all rows. There is one such sum a head, so plain torch's error is a matter of luck, and
    its terms cancel, not their errors: of delta from the rounded out, of the sink's weight from the rounded lse, and of
    the scores, that lse and out have.
    """
    q, k, v = (tensors[name] for name in "qkv")
    sinks, scale = tensors.get("sinks"), abs(options.get("scale") or q.shape[2] ** -0.5)
    in_order, in_order_v = (0.6 * max(1.0, x.shape[2] ** 0.5) * ulp for x in (q, v))
    largest_lse = score = term = 0.0
    squares = [torch.zeros(q.shape[1], dtype=q.dtype, device=q.device)]
    for rows, q_i, k_i, v_i in sequences_of(q, k, v, lengths, lengths_k):
        if not (len(q_i) and len(k_i)):
            continue
        weights, lse = softmax_of_one(q_i, k_i, sinks=sinks, **options)
        q_i, k_i, v_i, dout_i = (x.transpose(0, 1) for x in (q_i, k_i, v_i, dout[rows]))
        largest_lse = max(largest_lse, torch.nan_to_num(lse, neginf=0).abs().max().item())
        norms = norms_of_products(q_i, k_i)
        score = max(score, norms.max().item())
        term = max(term, (weights * norms_of_products(dout_i, v_i)).max().item())
        if sinks is not None:
            products, dlse_i = dout_i * (weights @ v_i), dlse[rows].t()
            dot = products.sum(2)
            by_out = ulp_of_out * (products.square().sum(2).sqrt() + dlse_i.abs())
            by_lse = ulp * (lse * (dot - dlse_i)).abs()
            by_score = weights * (dout_i @ v_i.transpose(1, 2) - (2 * dot - dlse_i)[..., None])
            by_scores = in_order * scale * (norms * by_score).square().sum(2).sqrt()
            of_row = by_out.square() + by_lse.square() + by_scores.square()
            squares.append(((sinks[:, None] - lse).exp().square() * of_row).sum(1))

    def largest(x: Tensor) -> float:
        return x.abs().max().item() if x.numel() else 0.0

    return {
        "relative": ulp / 2 * largest_lse,
        "lse": in_order * scale * score,
        "dq": in_order_v * term * scale * largest(k),
        "dk": in_order_v * term * scale * largest(q),
        "dsinks": torch.stack(squares).sum(0).sqrt().max().item(),
    }


def norms_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Of the terms of every dot product of a row of a with a row of b."""
    return (a.square() @ b.square().transpose(1, 2)).sqrt()
