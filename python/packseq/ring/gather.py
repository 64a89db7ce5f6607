"""What pieces of one sequence need of each other, fetched from the ranks that have it: one differentiable operator."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._registration import register_gradient, register_python_kernel
from .exchange import run
from .groups import Group, group_of, name_of
from .sharding import Sharding


def halo(x: Tensor, sharding: Sharding, group: Group, width: int, reverse: bool) -> Tensor:
    """The ``width`` rows that stand before each of this rank's pieces, in its sequence: ``[pieces, width, ...]``; after
    each piece, the nearest one last, where ``reverse``. Zeros where the sequence has none."""
    return _gather(x, sharding, group, "halo", -width if reverse else width)


def pieces_before(x: Tensor, sharding: Sharding, group: Group, reverse: bool) -> Tensor:
    """Of x, which has a row for each piece, those of the pieces before each of this rank's in its sequence, in their
    order: ``[pieces, most, ...]``, zeros first where there are fewer than most. After, the furthest first, where
    ``reverse``."""
    return _gather(x, sharding, group, "pieces_before", -1 if reverse else 1)


def last_pieces(x: Tensor, sharding: Sharding, group: Group, reverse: bool) -> Tensor:
    """Of x, which has a row for each piece, that of each sequence's last piece (first, where ``reverse``), on every
    rank: ``[sequences, ...]``, zeros for empty sequences."""
    return _gather(x, sharding, group, "last_pieces", -1 if reverse else 1)[:, 0]


def unshard(x: Tensor, sharding: Sharding, group: Group = None) -> Tensor:
    """The whole batch's rows, on every rank, from each rank's own: ``[total, ...]``, differentiable."""
    return _gather(x, sharding, group, "all_rows", 0)[:, 0]


def _gather(x: Tensor, sharding: Sharding, group: Group, what: str, number: int) -> Tensor:
    return torch.ops.packseq.ring_gather(x, sharding.key, name_of(group), what, number)


# ---- who fetches what from where

# A table's rows are what some rank fetches: that rank, the rank that has it, and its place there (-1: nobody, zeros). A
# rank's come in the order in which it wants them, so many for each of its items.


def _table_of_halo(sharding: Sharding, width: int) -> tuple[Tensor, int]:
    rank, sequence, begin, end = sharding.pieces.unbind(1)
    ahead = torch.arange(abs(width))
    row = begin[:, None] - width + ahead if width >= 0 else end[:, None] - 1 - width - ahead
    length = sharding.cu_seqlens.diff()[sequence][:, None]
    exists = (row >= 0) & (row < length)
    table = torch.stack([rank[:, None].expand_as(row), torch.full_like(row, -1), torch.full_like(row, -1)], 2)
    table[exists, 1], table[exists, 2] = sharding.holders((sharding.cu_seqlens[sequence][:, None] + row)[exists])
    return table.reshape(-1, 3), abs(width)


def _chains(sharding: Sharding, direction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pieces sequence by sequence, in the scan's direction: rank, place among the rank's, sequence, and place among
    the sequence's."""
    rank, sequence, begin, _ = sharding.pieces.unbind(1)
    place = torch.arange(len(rank)) - torch.tensor([x.start for x in sharding.of_rank])[rank]
    order = (begin * direction).argsort(stable=True)
    order = order[sequence[order].argsort(stable=True)]
    rank, place, sequence = rank[order], place[order], sequence[order]
    first = torch.searchsorted(sequence, sequence)
    return rank, place, sequence, torch.arange(len(rank)) - first


def _table_of_pieces_before(sharding: Sharding, direction: int) -> tuple[Tensor, int]:
    rank, place, _, nth = _chains(sharding, direction)
    most = int(nth.max()) if len(nth) else 0
    back = torch.arange(most, 0, -1)
    exists = nth[:, None] >= back
    before = (torch.arange(len(rank))[:, None] - back).clamp(min=0)
    table = torch.stack([rank[:, None].expand_as(before), rank[before], place[before]], 2)
    table[..., 1:][~exists] = -1
    order = place.argsort(stable=True)  # as every rank has its pieces
    return table[order[rank[order].argsort(stable=True)]].reshape(-1, 3), most


def _table_of_last_pieces(sharding: Sharding, direction: int) -> tuple[Tensor, int]:
    rank, place, sequence, _ = _chains(sharding, direction)
    is_last = torch.cat([sequence.diff() != 0, torch.ones(len(sequence[:1]), dtype=torch.bool)])
    last = torch.full((sharding.sequences, 2), -1)
    last[sequence[is_last]] = torch.stack([rank, place], 1)[is_last]
    return _to_all(last, sharding.world), 1


def _table_of_all_rows(sharding: Sharding, _: int) -> tuple[Tensor, int]:
    return _to_all(torch.stack(sharding.holders(torch.arange(sharding.total)), 1), sharding.world), 1


def _to_all(wanted: Tensor, world: int) -> Tensor:
    rank = torch.arange(world).repeat_interleave(len(wanted))
    return torch.cat([rank[:, None], wanted.repeat(world, 1)], 1)


_TABLES = {
    "halo": _table_of_halo,
    "pieces_before": _table_of_pieces_before,
    "last_pieces": _table_of_last_pieces,
    "all_rows": _table_of_all_rows,
}


@dataclass
class _Plan:
    """A rank's part of a table."""

    sends: Tensor  # which of its rows it sends, by the rank they go to
    send_rows: list[int]
    recv_rows: list[int]
    places: Tensor  # of the rows it wants, among those received; behind them for zeros
    shape: tuple[int, int]  # items, and rows for each
    turns: list[tuple[Tensor, Tensor]]  # of the sent rows, and among a rank's: no row twice in a turn


def _plan(key: Tensor, group: ProcessGroup, what: str, number: int, device: torch.device) -> _Plan:
    sharding, rank = Sharding.of(key), group.rank()
    if group.size() != sharding.world:
        raise ValueError(f"ring: group must have the sharding's {sharding.world} ranks, got {group.size()}")

    def make() -> _Plan:
        table, each = _TABLES[what](sharding, number)
        sends, wants = table[table[:, 1] == rank], table[table[:, 0] == rank]
        has = wants[:, 1] >= 0
        places = torch.full((len(wants),), int(has.sum()))
        places[has] = wants[has, 1].argsort(stable=True).argsort()
        send_rows, recv_rows = (torch.bincount(x, minlength=sharding.world) for x in (sends[:, 0], wants[has, 1]))
        mine = sharding.of_rank[rank]
        items = len(wants) // each if each else mine.stop - mine.start
        turns = [(sent.to(device), sends[sent, 2].to(device)) for sent in _turns(sends[:, 2])]
        return _Plan(
            sends[:, 2].to(device), send_rows.tolist(), recv_rows.tolist(), places.to(device), (items, each), turns
        )

    return sharding.cached((what, number, rank, device), make)


def _turns(rows: Tensor) -> list[Tensor]:
    """Where in a list each row stands for the first time, the second, and so on."""
    order = rows.argsort(stable=True)
    nth = torch.arange(len(rows)) - torch.searchsorted(rows[order], rows[order])
    return [order[nth == i] for i in range(int(nth.max()) + 1 if len(rows) else 0)]


def _by_rank(x: Tensor, rows: list[int]) -> list[tuple[Tensor, int]]:
    return [(part, peer) for peer, part in enumerate(x.split(rows))]


def _ring_gather(x, key, group, what, number):
    group = group_of(group)
    plan = _plan(key, group, what, number, x.device)
    count = sum(plan.recv_rows)
    received = x.new_empty(count + 1, *x.shape[1:])
    received[count:] = 0
    sent = x.index_select(0, plan.sends)
    run(_by_rank(sent, plan.send_rows), _by_rank(received[:count], plan.recv_rows), group, what)
    return received.index_select(0, plan.places).view(*plan.shape, *x.shape[1:])


def _ring_gather_backward(dout, rows, key, group, what, number):
    group = group_of(group)
    plan = _plan(key, group, what, number, dout.device)
    count, shape = sum(plan.recv_rows), dout.shape[2:]
    sent = dout.new_empty(count + 1, *shape)
    sent[plan.places] = dout.reshape(-1, *shape)
    received = dout.new_empty(len(plan.sends), *shape)
    run(_by_rank(sent[:count], plan.recv_rows), _by_rank(received, plan.send_rows), group, f"{what}, backward")
    dx = dout.new_zeros(rows, *shape)
    for sent, to in plan.turns:
        dx[to] += received[sent]
    return dx


register_python_kernel("ring_gather", _ring_gather)
register_python_kernel("ring_gather_backward", _ring_gather_backward)


@torch.library.register_fake("packseq::ring_gather")
def _(x, key, group, what, number):
    size = torch.library.get_ctx().new_dynamic_size
    each = abs(number) if what == "halo" else size() if what == "pieces_before" else 1
    return x.new_empty(size(), each, *x.shape[1:])


@torch.library.register_fake("packseq::ring_gather_backward")
def _(dout, rows, key, group, what, number):
    return dout.new_empty(rows, *dout.shape[2:])


def _save(ctx, inputs, output):
    x, key, *ctx.options = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(key)


def _backward(ctx, dout):
    (key,) = ctx.saved_tensors
    return torch.ops.packseq.ring_gather_backward(dout, ctx.rows, key, *ctx.options), None, None, None, None


register_gradient("ring_gather", _backward, _save)
