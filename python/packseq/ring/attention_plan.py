"""Which keys a rank's queries see on which rank, and the calls of the attention kernels that this takes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .sharding import Sharding
from .some_rows import SomeRows

_FAR = 1 << 31


class Mask(NamedTuple):
    """The options that say which keys a query sees; -1 is unbounded. ``biased``: scores depend on the distance."""

    causal: bool
    left: int
    right: int
    sink_tokens: int
    biased: bool

    @property
    def local(self) -> bool:
        """Whether more than the order of queries and keys counts."""
        return self.biased or self.left >= 0 or (self.right >= 0 and not self.causal)


class Call(NamedTuple):
    """Queries and keys as packseq::attention_accumulate takes them: int32 boundaries and positions."""

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    positions: Tensor


@dataclass
class Step:
    """A rank sends keys and values to the rank so many places on, and gets as many as it needs from that before it."""

    shift: int
    send: SomeRows  # which of its rows go
    receives: int
    calls: list[Call]


def attention_plan(sharding: Sharding, mask: Mask, rank: int, device: torch.device) -> list[Step | None]:
    """The steps by their shift, so that all ranks have them in one order; None where the rank has nothing to do."""
    wants = _by_rank(_pairs(sharding, mask, queries_of=rank), 1, sharding.world)
    wanted = _by_rank(_pairs(sharding, mask, keys_of=rank), 0, sharding.world)
    plan = []
    for shift in range(sharding.world):
        source, target = (rank - shift) % sharding.world, (rank + shift) % sharding.world
        needs, gives = _Fetch(sharding, wants[source]), _Fetch(sharding, wanted[target])
        if not needs.total and not gives.total:
            plan.append(None)
            continue
        plan.append(Step(shift, gives.rows(device), needs.total, needs.calls(mask, device)))
    return plan


def _pairs(sharding: Sharding, mask: Mask, queries_of: int | None = None, keys_of: int | None = None) -> Tensor:
    """The pairs of a piece of queries and one of keys, of one sequence, of which some query sees some key: int64
    ``[pairs, 8]`` with the ranks of both, the pieces, the sequence, the first key seen and one past the last, and
    whether every query sees all of these."""
    pieces = sharding.pieces
    every = slice(0, len(pieces))
    q_slice, k_slice = (every if r is None else sharding.of_rank[r] for r in (queries_of, keys_of))
    keys = torch.arange(len(pieces))[k_slice]
    keys = keys[pieces[keys, 1].argsort(stable=True)]
    queries = torch.arange(len(pieces))[q_slice]
    first = torch.searchsorted(pieces[keys, 1].contiguous(), pieces[queries, 1].contiguous())
    last = torch.searchsorted(pieces[keys, 1].contiguous(), pieces[queries, 1].contiguous(), right=True)
    counts = last - first
    q = queries.repeat_interleave(counts)
    k = keys[torch.arange(len(q)) + (first - counts.cumsum(0) + counts).repeat_interleave(counts)]

    q_begin, q_end, k_begin, k_end = *pieces[q, 2:].unbind(1), *pieces[k, 2:].unbind(1)
    left = mask.left if mask.left >= 0 else _FAR
    right = mask.right if mask.right >= 0 else _FAR
    hard = 0 if mask.causal else _FAR
    right = min(right, hard)
    begin, end = torch.maximum(k_begin, q_begin - left), torch.minimum(k_end, q_end + right)
    full = (q_end - 1 - left <= begin) & (q_begin + right >= end - 1)
    if mask.sink_tokens:
        sinks_end = torch.minimum(k_end, q_end + hard).clamp(max=mask.sink_tokens)
        sinks = sinks_end > k_begin
        window = end > begin
        begin = torch.where(sinks, k_begin, begin)
        end = torch.where(sinks, torch.where(window, torch.maximum(end, sinks_end), sinks_end), end)
    columns = pieces[q, 0], pieces[k, 0], q, k, pieces[q, 1], begin, end, full
    return torch.stack([x.long() for x in columns], 1)[end > begin]


def _by_rank(pairs: Tensor, column: int, world: int) -> list[Tensor]:
    """The pairs of each rank in a column, in the order that they are in."""
    counts = torch.bincount(pairs[:, column], minlength=world).tolist()
    return list(pairs[pairs[:, column].argsort(stable=True)].split(counts))


class _Fetch:
    """What the queries of one rank need of the keys of another: of each piece of keys the run that some query sees."""

    def __init__(self, sharding: Sharding, pairs: Tensor):
        self.sharding, self.pairs = sharding, pairs
        self.pieces, of_piece = pairs[:, 3].unique(return_inverse=True)  # in the order of the rank's rows
        self.of_piece = of_piece
        count = len(self.pieces)
        self.begin = torch.full((count,), _FAR).scatter_reduce_(0, of_piece, pairs[:, 5], "amin")
        self.end = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, of_piece, pairs[:, 6], "amax")
        self.ends = (self.end - self.begin).cumsum(0)  # of each piece's rows, among those fetched
        self.total = int(self.ends[-1]) if count else 0

    def rows(self, device: torch.device) -> SomeRows:
        """Among the rows of the rank that has them."""
        first = self.sharding.first_rows[self.pieces] + self.begin - self.sharding.pieces[self.pieces, 2]
        sizes = self.end - self.begin
        return SomeRows(torch.arange(self.total) + (first - self.ends + sizes).repeat_interleave(sizes), device)

    def calls(self, mask: Mask, device: torch.device) -> list[Call]:
        if not self.total:
            return []
        pieces, (q, k) = self.sharding.pieces, self.pairs[:, 2:4].unbind(1)
        q0 = self.sharding.first_rows[q]
        k0 = (self.ends - self.end + self.begin)[self.of_piece]
        q1, k1 = q0 + pieces[q, 3] - pieces[q, 2], self.ends[self.of_piece]
        entries = torch.stack([q0, q1, k0, k1, pieces[q, 2], self.begin[self.of_piece]], 1)
        # A sequence's n-th run of queries with its n-th run of keys, then every n-th with the (n - 1)-th, and so on: in
        # none of these does a row occur twice, and all go forward in both.
        diagonal = self.sharding.nth[q] - self.sharding.nth[k]
        if not mask.local:
            entries, diagonal = self._merged(entries, diagonal)
        return [_call(entries[diagonal == i], self.total, device) for i in diagonal.unique().tolist()]

    def _merged(self, entries: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Only the order counts: where all pairs of some runs of queries and some of keys are there, one entry takes
        their place. With itself a rank's runs are in order: the mask of the rows as they stand is right."""
        sequences, of = self.pairs[:, 4].unique(return_inverse=True)
        zeros = torch.zeros(len(sequences), dtype=torch.int64)

        def reduce(x: Tensor, how: str) -> Tensor:
            return zeros.scatter_reduce(0, of, x, how, include_self=False)

        low = [reduce(entries[:, i], "amin") for i in (0, 2)]
        high = [reduce(entries[:, i], "amax") for i in (1, 3)]
        itself = self.pairs[0, 0] == self.pairs[0, 1]
        area = zeros.scatter_add(0, of, (entries[:, 1] - entries[:, 0]) * (entries[:, 3] - entries[:, 2]))
        full = reduce(self.pairs[:, 7], "amin").bool() & (area == (high[0] - low[0]) * (high[1] - low[1]))
        merges = full | itself
        shift = torch.where(full, high[1] - low[1], zeros)  # far enough for all keys to be before all queries
        merged = torch.stack([low[0], high[0], low[1], high[1], shift, zeros], 1)[merges]
        rest = ~merges[of]
        diagonal = torch.cat([torch.zeros(len(merged), dtype=torch.int64), diagonal[rest]])
        return torch.cat([merged, entries[rest]]), diagonal


def _call(entries: Tensor, keys: int, device: torch.device) -> Call:
    """Boundaries that lead over what no entry has: before each, queries that see no key, then keys that none sees, and
    such keys at the end, so that every one of them is of some sequence."""
    entries = entries[entries[:, 0].argsort()]
    end = torch.tensor([[0, 0, keys, keys, 0, 0]])
    end[0, :2] = entries[-1, 1]
    entries = torch.cat([entries, end])
    q0, q1, k0, k1 = (x.contiguous() for x in entries[:, :4].unbind(1))
    positions = entries[:, 4:]
    before = torch.cat([k1.new_zeros(1), k1[:-1]])
    ends_q, ends_k = torch.stack([q0, q0, q1], 1).reshape(-1), torch.stack([before, k0, k1], 1).reshape(-1)
    positions = torch.stack([positions, positions, positions], 1).reshape(-1, 2)
    starts_q, starts_k = (torch.cat([x.new_zeros(1), x[:-1]]) for x in (ends_q, ends_k))
    there = (ends_q > starts_q) | (ends_k > starts_k)
    zero = ends_q.new_zeros(1)
    tensors = torch.cat([zero, ends_q[there]]), torch.cat([zero, ends_k[there]]), positions[there].contiguous()
    return Call(*(x.int().to(device) for x in tensors))
