"""Attention over sequences that are spread over ranks: a ring of keys and values, heads split within it, or both."""

import math
from functools import partial

import torch
from torch import Tensor

from .._registration import register_autocast, register_gradient, register_python_kernel
from ..attention import window_limits
from .attention_plan import Mask, Step, attention_plan
from .communicator import communicator
from .exchange import Transfer, needs_communicator, start
from .groups import Group, group_of, name_of
from .heads import Heads
from .sharding import Sharding
from .some_rows import SomeRows

_ALIBI_SLOPES, _SINKS = 10, 11  # their places among the operator's arguments


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: Sharding,
    group: Group = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    sink_tokens: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`packseq.attention` of a batch whose rows are spread over ranks; every rank calls it with its own.

    In steps: at step ``s`` a rank gets from the rank ``s`` before it the keys and values that its queries see there,
    while it computes with those of the step before. Nothing is sent that no query sees: under a causal mask that is
    about half, and windows and whole sequences leave steps out on both ends. Of grouped heads the keys' and values'
    travel, once. Results of the steps are added up in float32 (float64 for float64), always in the same order.

    Where a sequence has ``ulysses`` ranks a shard, these exchange rows for heads before and after, so that each has all
    of the shard's rows and a part of the heads (as even as there are heads; some have none where there are fewer).

    Args:
        q: this rank's rows, ``[rows, heads, dim]``, as :meth:`Sharding.shard` deals them out; more are slack.
        k, v: likewise, as in :func:`packseq.attention`.
        sharding: the same on every rank.
        group: the ranks, as many as the sharding's: a process group, a mesh of one dimension, or None for all.
        causal, window, sink_tokens, softcap, alibi_slopes, sinks, scale, return_lse: as in :func:`packseq.attention`,
            places and distances counted in whole sequences.

    Returns:
        ``out [rows, heads, dim_v]`` in q's dtype, or ``(out, lse)``. The gradient of ``sinks`` is what this rank's rows
        give; the whole one is the sum over the ranks.

    Raises:
        ValueError, NotImplementedError: as :func:`packseq.attention`.
        RuntimeError: a rank is lost, or did not answer within the group's timeout.

    Sources: Li et al., arXiv 2105.13120 (the ring); Liu et al., 2310.01889 (with an online softmax); Jacobs et al.,
    2309.14509 (Ulysses); Fang and Zhao, 2405.07719 (both).
    """
    left, right = window_limits(window)
    out, lse = torch.ops.packseq.ring_attention(
        *(q, k, v, sharding.key, name_of(group), causal, left, right, sink_tokens, softcap),
        *(alibi_slopes, sinks, scale),
    )
    return (out, lse) if return_lse else out


class _Ring:
    """One part of the sequences: its plan and the options, what both directions share."""

    def __init__(self, part, group, q, k, causal, left, right, sink_tokens, softcap, alibi_slopes, sinks, scale):
        self.group, self.width = group, part.ulysses
        self.heads = Heads(part, group, q.shape[1], k.shape[1])
        mask = Mask(causal, left, right, sink_tokens, alibi_slopes is not None)
        self.world, self.rank = part.shards.world, group.rank()
        self.steps = part.shards.cached(
            (mask, self.rank // self.width, q.device),
            lambda: attention_plan(part.shards, mask, self.rank // self.width, q.device),
        )
        slopes = None if alibi_slopes is None else alibi_slopes[self.heads.of_q]
        self.sinks = None if sinks is None else sinks[self.heads.of_q]
        scale = q.shape[2] ** -0.5 if scale is None else scale
        self.options = (causal, left, right, sink_tokens, softcap, slopes, scale)

    def peer(self, shift: int) -> int:
        """The rank of the group that has the same heads so many shards on."""
        shard, of_heads = divmod(self.rank, self.width)
        return (shard + shift) % self.world * self.width + of_heads

    def fetch(self, step: Step | None, k: Tensor, v: Tensor) -> tuple[Transfer | None, list[Tensor]]:
        """Starts bringing the keys and values of a step."""
        if step is None:
            return None, []
        if step.shift == 0:
            return None, [step.send.of(x) for x in (k, v)]
        arriving = [x.new_empty(step.receives, *x.shape[1:]) for x in (k, v)]
        transfer = self.transfer(
            [step.send.of(x).contiguous() for x in (k, v)], arriving, step.shift, "keys and values"
        )
        return transfer, arriving

    def transfer(self, sends: list[Tensor], receives: list[Tensor], shift: int, what: str, **then) -> Transfer:
        to, source = self.peer(shift), self.peer(-shift)
        label = f"ring step {shift}, {what}"
        return start([(x, to) for x in sends], [(x, source) for x in receives], self.group, label, **then)

    def with_keys(self, k: Tensor, v: Tensor):
        """The steps, each with its keys and values; the next step's are on their way meanwhile."""
        coming = self.fetch(self.steps[0], k, v)
        for step, after in zip(self.steps, [*self.steps[1:], None], strict=True):
            transfer, keys = coming
            if transfer:
                transfer.wait()
            coming = self.fetch(after, k, v)
            yield step, keys


def _parts(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, group: str, options: tuple
) -> tuple[int, list[tuple[_Ring, SomeRows]]]:
    """How many rows this rank has, and which of them each part's are."""
    sharding, group = Sharding.of(key), group_of(group)
    rank = group.rank()
    if group.size() != sharding.world:
        raise ValueError(f"ring_attention: group must have the sharding's {sharding.world} ranks, got {group.size()}")
    size = sharding.sizes[rank]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] < size:
            raise ValueError(
                f"ring_attention: {name} must be [rows, heads, dim] with at least this rank's {size} rows, "
                f"got shape {list(x.shape)}"
            )
    if needs_communicator(q.device, group):
        communicator(group)
    return size, [(_Ring(part, group, q, k, *options), part.rows(rank, sharding, q.device)) for part in sharding.parts]


def _ring_attention(q, k, v, key, group, *options):
    size, parts = _parts(q, k, v, key, group, options)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_zeros(q.shape[:2], dtype=statistics)
    out[size:] = 0
    for ring, rows in parts:
        for whole, part in zip((out, lse), _forward(ring, *map(rows.of, (q, k, v))), strict=True):
            rows.put(whole, part)
    return out, lse


def _forward(ring: _Ring, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = ring.heads.split([q], [k, v])
    sums = q.new_zeros(*q.shape[:2], 2, dtype=statistics)
    sums[..., 0] = -math.inf
    total = q.new_empty(*q.shape[:2], v.shape[2], dtype=statistics)
    for step, keys in ring.with_keys(k, v):
        for call in step.calls if step and q.shape[1] else ():
            torch.ops.packseq.attention_accumulate(q, *keys, total, sums, *call, *ring.options)
    out, lse = q.new_empty(total.shape), sums.new_empty(q.shape[:2])
    torch.ops.packseq.attention_finish(total, sums, ring.sinks, out, lse)
    return ring.heads.join([out, lse])


def _ring_attention_backward(dout, dlse, q, k, v, out, lse, key, group, *options):
    size, parts = _parts(q, k, v, key, group, options)
    sinks = options[-2]
    delta = torch.ops.packseq.attention_delta(dout, out, dlse)
    dsinks = lse.new_empty(0)
    if sinks is not None:
        seen = lse[:size] > -math.inf
        dsinks = -(torch.where(seen, (sinks - lse[:size]).exp() * delta[:size], 0)).sum(0)
    gradients = [x.new_zeros(x.shape) for x in (q, k, v)]
    for ring, rows in parts:
        found = _backward_of(ring, *map(rows.of, (dout, delta, q, k, v, lse)))
        for whole, part in zip(gradients, found, strict=True):
            rows.put(whole, part)
    return *gradients, dsinks


def _backward_of(
    ring: _Ring, dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> list[Tensor]:
    q, dout, lse, delta, k, v = ring.heads.split([q, dout, lse, delta], [k, v])
    dq = q.new_zeros(q.shape, dtype=lse.dtype)
    dk, dv = (x.new_empty(x.shape, dtype=lse.dtype) for x in (k, v))
    returning = None  # the gradients of the step before, on their way to whom the keys and values are, added there
    for step, keys in ring.with_keys(k, v):
        mine = step is not None and step.shift == 0  # every row sees itself: all of them, as they stand
        dkeys = [dk, dv] if mine else [x.new_empty(x.shape, dtype=lse.dtype) for x in keys]
        for i, call in enumerate(step.calls if step and q.shape[1] else ()):
            torch.ops.packseq.attention_accumulate_backward(
                dout, delta, q, *keys, lse, dq, *dkeys, i > 0, *call, *ring.options
            )
        if returning:
            returning.wait()
            returning = None
        if step is not None and not mine:
            arriving = [x.new_empty(step.send.count, *x.shape[1:]) for x in dkeys]
            add = partial(step.send.add, [dk, dv], arriving)
            returning = ring.transfer(dkeys, arriving, -step.shift, "their gradients", then=add, uses=[dk, dv])
    if returning:
        returning.wait()
    return ring.heads.join([dq], [dk, dv])


register_python_kernel("ring_attention", _ring_attention)
register_python_kernel("ring_attention_backward", _ring_attention_backward)


@torch.library.register_fake("packseq::ring_attention")
def _(q, k, v, *options):
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[:2], dtype=statistics)


@torch.library.register_fake("packseq::ring_attention_backward")
def _(dout, dlse, q, k, v, out, lse, *options):
    dsinks = lse.new_empty(0 if options[-2] is None else q.shape[1])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx, inputs, output):
    if any(ctx.needs_input_grad[_ALIBI_SLOPES : _ALIBI_SLOPES + 1]):
        raise NotImplementedError("ring_attention: alibi_slopes has no gradient, it must not require one: detach() it")
    q, k, v, key, *ctx.options, alibi_slopes, sinks, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, key, alibi_slopes, sinks)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, key, alibi_slopes, sinks = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = torch.ops.packseq.ring_attention_backward(
        dout, dlse, q, k, v, out, lse, key, *ctx.options, alibi_slopes, sinks, ctx.scale
    )
    grads = [dq, dk, dv, *[None] * 10]
    grads[_SINKS] = None if sinks is None else dsinks
    return tuple(grads)


register_gradient("ring_attention", _backward, _save)
register_autocast("ring_attention", lambda cast, q, k, v, *rest: (cast(q), cast(k), cast(v), *rest))
