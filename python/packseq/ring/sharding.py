"""Which rows of a packed batch each rank has: laid out once a step, on the host, from the boundaries alone."""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import count
from typing import ClassVar, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .some_rows import SomeRows

T = TypeVar("T")
Lengths = Tensor | Sequence[int]


class Sharding:
    """The rows of a packed batch, dealt out to ranks in pieces: runs of rows of one sequence.

    Every rank makes the same one and passes it to the functions of packseq.ring. A rank's rows stand in the order of
    its pieces, which is that of the batch. Made by :func:`shard`.

    Attributes:
        world: the number of ranks.
        cu_seqlens: the whole batch's boundaries, int64 ``[sequences + 1]``.
        pieces: int64 ``[pieces, 4]``: rank, sequence, and the first row and one past the last row, counted within the
            sequence. Sorted by these; none is empty, no two that touch are of one rank.
        key: an int64 tensor of one number, which operators know it by as long as it lives.

    All are on the CPU; what the methods return is on the device they are asked for, and made once.
    """

    _alive: ClassVar = WeakValueDictionary()  # by number
    _numbers: ClassVar = count()

    def __init__(self, cu_seqlens: Tensor, pieces: Tensor, world: int, parts: Sequence["Part"] | None = None):
        self.cu_seqlens, self.pieces, self.world = cu_seqlens, _joined(_sorted(pieces)), world
        self._parts = parts
        self._cache: dict = {}
        number = next(Sharding._numbers)
        Sharding._alive[number] = self
        self.key = torch.tensor([number])

    @staticmethod
    def of(key: Tensor) -> "Sharding":
        found = Sharding._alive.get(int(key))
        if found is None:
            raise RuntimeError("ring: the sharding must be kept until the backward has run, it is gone")
        return found

    @property
    def parts(self) -> Sequence["Part"]:
        """The sequences by how many ranks share a shard of theirs."""
        return [Part(1, self, self)] if self._parts is None else self._parts

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return int(self.cu_seqlens[-1])

    @property
    def sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """Rows of each piece."""
        return self.pieces[:, 3] - self.pieces[:, 2]

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each rank."""
        return torch.zeros(self.world, dtype=torch.int64).index_add_(0, self.pieces[:, 0], self.lengths).tolist()

    @cached_property
    def of_rank(self) -> list[slice]:
        """Each rank's pieces."""
        ends = torch.searchsorted(self.pieces[:, 0].contiguous(), torch.arange(self.world + 1)).tolist()
        return [slice(*ends[rank : rank + 2]) for rank in range(self.world)]

    @cached_property
    def first_rows(self) -> Tensor:
        """The row, among those of its rank, that each piece begins at."""
        before = self.lengths.cumsum(0) - self.lengths
        of_ranks = torch.tensor([0, *self.sizes]).cumsum(0)
        return before - of_ranks[self.pieces[:, 0]]

    @cached_property
    def cut(self) -> bool:
        """Whether any sequence is of several pieces."""
        return len(self.pieces) > int((self.cu_seqlens.diff() > 0).sum())

    @cached_property
    def nth(self) -> Tensor:
        """The place of each piece among those that its rank has of its sequence."""
        number = self.pieces[:, 0] * self.sequences + self.pieces[:, 1]
        return torch.arange(len(number)) - torch.searchsorted(number, number)

    # ---- what a rank needs beside its rows

    def rows(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The batch's row that each of the rank's rows is, int64 ``[sizes[rank]]``."""
        begins = self.cu_seqlens[self.pieces[:, 1]]
        return self.cached(("rows", rank, device), lambda: self._places(rank, begins).to(device))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The place of each of the rank's rows in its sequence, ``[sizes[rank]]``, as rotary embeddings take it."""
        begins = torch.zeros_like(self.lengths)
        return self.cached(("positions", rank, device), lambda: self._places(rank, begins).to(device))

    def local_cu_seqlens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The boundaries of the rank's pieces, int32 ``[pieces + 1]``."""

        def make() -> Tensor:
            ends = self.lengths[self.of_rank[rank]].cumsum(0)
            return torch.cat([ends.new_zeros(1), ends]).int().to(device)

        return self.cached(("local_cu_seqlens", rank, device), make)

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """The rank's rows of a tensor that holds the whole batch's: ids, labels, whatever there is one of per token."""
        if x.dim() == 0 or x.shape[0] < self.total:
            raise ValueError(f"shard: x must have at least the batch's {self.total} rows, got shape {list(x.shape)}")
        return x.index_select(0, self.rows(rank, x.device))

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole batch's rows from those of all ranks, in their order; rows beyond a rank's own are left out."""
        if len(parts) != self.world or any(len(x) < size for x, size in zip(parts, self.sizes, strict=True)):
            raise ValueError(
                f"unshard: parts must be {self.world} tensors of at least {self.sizes} rows, "
                f"got {[list(x.shape) for x in parts]}"
            )
        rows = torch.cat([x[:size] for x, size in zip(parts, self.sizes, strict=True)])
        return rows.index_select(0, self.places(rows.device))

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """Where each of the batch's rows stands when the ranks' rows are put one after another, int64 ``[total]``."""
        every = range(self.world)
        return self.cached(("places", device), lambda: torch.cat([self.rows(r) for r in every]).argsort().to(device))

    def holders(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which rank has each of these rows of the batch, and which of its rows that is."""
        place, ends = self.places()[rows], torch.tensor(self.sizes).cumsum(0)
        rank = torch.searchsorted(ends, place, right=True)
        return rank, place - (ends - torch.tensor(self.sizes))[rank]

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` makes, made once."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def _places(self, rank: int, sequence_begins: Tensor) -> Tensor:
        mine = self.of_rank[rank]
        offsets = (sequence_begins + self.pieces[:, 2] - self.first_rows)[mine]
        return torch.arange(self.sizes[rank]) + offsets.repeat_interleave(self.lengths[mine])


class Part(NamedTuple):
    """Some of a batch's sequences: dealt out to shards, whose rows are then cut into a run for each of their ranks."""

    ulysses: int  # ranks of a shard
    shards: Sharding  # over ``world / ulysses``
    ranks: Sharding  # over ``world``

    def rows(self, rank: int, whole: Sharding, device: torch.device) -> SomeRows:
        """Where the rank's rows of these sequences stand among all of its rows; both stand in the batch's order."""

        def make() -> SomeRows:
            return SomeRows(torch.searchsorted(whole.rows(rank), self.ranks.rows(rank)), device)

        return self.ranks.cached(("among", rank, device), make)


def shard(
    cu_seqlens: Lengths,
    world: int,
    layout: str = "zigzag",
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    ulysses: int | Sequence[int] = 1,
) -> Sharding:
    """Deals the rows of a packed batch out to ranks. Sequences may have any lengths, and need not divide by anything.

    - ``"zigzag"``: every sequence is cut into two chunks a rank, as even as its length allows, and rank ``r`` of ``P``
      gets chunks ``r`` and ``2 P - 1 - r``: under a causal mask all ranks have as much to do. What does not divide goes
      around, so that no rank has over a row more than another.
    - ``"contiguous"``: the batch is cut into one run of rows a rank. Few sequences straddle ranks: scans, convolutions
      and windows have least to exchange.

    Args:
        cu_seqlens: the batch's boundaries, ``[sequences + 1]``: ints, or a tensor (on a GPU, it is copied to the host).
        world: the number of ranks.
        layout: ``"zigzag"`` or ``"contiguous"``.
        spans: with ``"zigzag"``, the ranks each sequence is spread over, (first, count): a planner's answer. None: all.
        ulysses: the ranks that share a shard of :func:`packseq.ring.ring_attention` and split its heads; divides
            ``world``, and both numbers of a span. Ranks ``i * ulysses`` to ``(i + 1) * ulysses - 1`` have a run each of
            the rows of shard ``i``. With ``"zigzag"``, it can be a number for each sequence: a planner's answer too.

    Raises:
        ValueError: an argument has a wrong value.

    Zigzag: github.com/zhuzilin/ring-flash-attention, and Striped Attention (arXiv 2311.09431) before it.
    """
    bounds = torch.as_tensor(cu_seqlens).detach().to("cpu", torch.int64)
    if bounds.dim() != 1 or len(bounds) < 1 or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
        raise ValueError("shard: cu_seqlens must be [sequences + 1], start at 0 and never decrease")
    lengths = bounds.diff()
    if layout not in ("zigzag", "contiguous"):
        raise ValueError(f'shard: layout must be "zigzag" or "contiguous", got {layout!r}')
    if layout == "contiguous" and not (spans is None and isinstance(ulysses, int)):
        raise ValueError('shard: spans must be None and ulysses one number unless layout is "zigzag"')
    each = [ulysses] * len(lengths) if isinstance(ulysses, int) else [int(n) for n in ulysses]
    widths = {ulysses} if isinstance(ulysses, int) else set(each)
    if world < 1 or len(each) != len(lengths) or any(n < 1 or world % n for n in widths):
        raise ValueError(
            f"shard: ulysses must divide world, for all or each of {len(lengths)} sequences, got {ulysses} and {world}"
        )
    table = _checked_spans(spans, each, world)
    parts = []
    for width in sorted(widths):
        if layout == "contiguous":
            pieces = _cut(_whole(lengths), world // width)
        else:
            pieces = _zigzag(lengths, torch.div(table, width, rounding_mode="floor"), torch.tensor(each) == width)
        shards = Sharding(bounds, pieces, world // width)
        ranks = shards if width == 1 else Sharding(bounds, _cut(shards.pieces, width), world)
        parts.append(Part(width, shards, ranks))
    if len(parts) == 1 and parts[0].ulysses == 1:
        return parts[0].ranks
    every = torch.cat([part.ranks.pieces for part in parts]) if parts else _whole(lengths)
    return Sharding(bounds, every, world, parts)


def _checked_spans(spans: Sequence[tuple[int, int]] | None, ulysses: list[int], ranks: int) -> Tensor:
    if spans is None:
        return torch.tensor([[0, ranks]]).expand(len(ulysses), 2)
    table = torch.tensor(list(spans), dtype=torch.int64).reshape(-1, 2)
    first, count = table.unbind(1)
    if len(table) != len(ulysses) or bool(((first < 0) | (count < 1) | (first + count > ranks)).any()):
        raise ValueError(
            f"shard: spans must be {len(ulysses)} pairs (first, count) of ranks among {ranks}, got {list(spans)}"
        )
    if bool((table % torch.tensor(ulysses).reshape(-1, 1) != 0).any()):
        raise ValueError(f"shard: spans must be multiples of ulysses, got {list(spans)} and {ulysses}")
    return table


def _whole(lengths: Tensor) -> Tensor:
    """Pieces: every sequence, on rank 0."""
    zeros = torch.zeros_like(lengths)
    return _sorted(torch.stack([zeros, torch.arange(len(lengths)), zeros, lengths], 1))


def _zigzag(lengths: Tensor, spans: Tensor, chosen: Tensor) -> Tensor:
    """Pieces of the chosen sequences, in no order, among them empty ones."""
    pieces = [lengths.new_zeros(0, 4)]
    for first, ranks in spans[chosen].unique(dim=0).tolist():
        sequence = (chosen & (spans[:, 0] == first) & (spans[:, 1] == ranks)).nonzero()[:, 0]
        length = lengths[sequence]
        rest = length % (2 * ranks)
        begin = (rest.cumsum(0) - rest) % ranks  # the rank that the rest starts going around from
        turn = (torch.arange(ranks) - begin[:, None]) % ranks
        extra = torch.div(rest[:, None] - 1 - turn, ranks, rounding_mode="floor") + 1  # 0 to 2 rows for each rank
        sizes = (length // (2 * ranks))[:, None] + torch.cat([extra >= 1, (extra >= 2).flip(1)], 1).long()
        ends = sizes.cumsum(1)
        chunk = torch.arange(2 * ranks)
        rank = (first + torch.minimum(chunk, 2 * ranks - 1 - chunk)).expand_as(ends)
        pieces.append(torch.stack([rank, sequence[:, None].expand_as(ends), ends - sizes, ends], 2).reshape(-1, 4))
    return torch.cat(pieces)


def _cut(pieces: Tensor, parts: int) -> Tensor:
    """The pieces of ranks r, each rank's rows cut into so many runs, for ranks ``r * parts`` and on."""
    if parts == 1:
        return pieces
    cut = []
    for rank in pieces[:, 0].unique().tolist():
        mine = pieces[pieces[:, 0] == rank]
        ends = (mine[:, 3] - mine[:, 2]).cumsum(0)
        begins = ends - (mine[:, 3] - mine[:, 2])
        bounds = torch.arange(parts + 1) * (int(ends[-1]) if len(ends) else 0) // parts
        begin = torch.maximum(begins, bounds[:-1, None])  # [parts, pieces], of the rank's rows
        end = torch.minimum(ends, bounds[1:, None])
        of_part = (rank * parts + torch.arange(parts))[:, None].expand_as(begin)
        shift = mine[:, 2] - begins
        cut.append(torch.stack([of_part, mine[:, 1].expand_as(begin), begin + shift, end + shift], 2).reshape(-1, 4))
    return _sorted(torch.cat(cut)) if cut else pieces


def _sorted(pieces: Tensor) -> Tensor:
    pieces = pieces[pieces[:, 3] > pieces[:, 2]]
    for column in (2, 1, 0):
        pieces = pieces[pieces[:, column].argsort(stable=True)]
    return pieces


def _joined(pieces: Tensor) -> Tensor:
    """Sorted pieces, those of one rank that touch made one."""
    if not len(pieces):
        return pieces
    before, after = pieces[:-1], pieces[1:]
    touches = (before[:, :2] == after[:, :2]).all(1) & (before[:, 3] == after[:, 2])
    first = torch.cat([touches.new_ones(1), ~touches])
    last = torch.cat([~touches, touches.new_ones(1)])
    return torch.cat([pieces[first, :3], pieces[last, 3:]], 1)
