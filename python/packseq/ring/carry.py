"""States from piece to piece: what a sequence's earlier pieces, wherever they are, leave to its later ones."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .._registration import register_python_kernel
from .gather import last_pieces, pieces_before
from .groups import Group, group_of, name_of, resolve
from .sharding import Sharding


class Pieces(NamedTuple):
    """This rank's pieces, on the device of its rows."""

    cu_seqlens: Tensor  # int32 [pieces + 1]
    sequences: Tensor  # int64 [pieces], the sequence each is of
    before: Tensor  # int64 [pieces], rows of the sequence before the piece; after it, in reverse


def pieces_of(sharding: Sharding, group: Group, like: Tensor, reverse: bool) -> Pieces:
    return Pieces(*torch.ops.packseq.ring_pieces(like, sharding.key, name_of(group), reverse))


class PieceRun(NamedTuple):
    """A run of a rank's pieces."""

    rows: slice  # of the rank's
    cu_seqlens: Tensor  # int32 [pieces + 1]
    lengths: list[int] | None  # None where it is compiled
    sums: Callable[[Tensor], Tensor]  # of rows, over each piece


# Of pieces: the states that they end with when they start from zeros, [pieces, channels, N], and sums of d over each,
# [pieces, channels].
Summaries = Callable[[PieceRun], tuple[Tensor, Tensor]]


def states_before(
    summaries: Summaries,
    A: Tensor,
    pieces: Pieces,
    sharding: Sharding,
    group: Group,
    initial_states: Tensor | None,
    reverse: bool,
) -> Tensor | None:
    """The states that this rank's pieces start from, of ``h[t] = exp(d[t] A) h[t - 1] + ...``; None: zeros.

    Args:
        A: ``[channels, N]``: a piece decays what it starts from by ``exp(sum of d * A)``.
        initial_states: those of the sequences, ``[sequences, channels, N]``; None: zeros.
    """
    if torch.compiler.is_compiling() or sharding.cut:  # compiled, it is not known
        finals, steps = _of_carrying_pieces(summaries, pieces, sharding, group, reverse)
        return _carried(finals, steps, A, pieces, sharding, group, initial_states, reverse)
    return None if initial_states is None else initial_states.index_select(0, pieces.sequences)


def _of_carrying_pieces(
    summaries: Summaries, pieces: Pieces, sharding: Sharding, group: Group, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The summaries of the run of this rank's pieces that others of their sequences follow; zeros for the rest.
    (Compiled, of all: which they are is not known then.)"""
    if torch.compiler.is_compiling():
        sums = partial(_sums, levels=[pieces.cu_seqlens.long()])
        return summaries(PieceRun(slice(None), pieces.cu_seqlens, None, sums))
    rank, device = resolve(group).rank(), pieces.cu_seqlens.device
    begin, end = _carrying(sharding, rank, reverse)
    bounds = sharding.local_cu_seqlens(rank)[begin : end + 1].long()
    first, last = int(bounds[0]), int(bounds[-1])

    def levels() -> list[Tensor]:
        return [x.to(device) for x in _levels(bounds - first)]

    sums = partial(_sums, levels=sharding.cached(("levels", rank, reverse, device), levels))
    cu_seqlens = pieces.cu_seqlens[begin : end + 1] - first
    found = summaries(PieceRun(slice(first, last), cu_seqlens, bounds.diff().tolist(), sums))
    after = len(pieces.cu_seqlens) - 1 - end
    return tuple(torch.cat([x.new_zeros(begin, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])]) for x in found)


_RUN = 64  # rows that are summed one after another


def _levels(bounds: Tensor) -> list[Tensor]:
    """Boundaries of runs of rows, of runs of these sums, and so on up to the pieces': each piece by its own length. Of
    no piece none: what would be launched on a GPU would be empty."""
    levels = []
    if len(bounds) == 1:
        return levels
    while int(bounds.diff().max()) > _RUN:
        runs = (bounds.diff() + _RUN - 1) // _RUN
        ends = runs.cumsum(0)
        nth = torch.arange(int(ends[-1])) - (ends - runs).repeat_interleave(runs)
        levels.append(torch.cat([bounds[:-1].repeat_interleave(runs) + _RUN * nth, bounds[-1:]]))
        bounds = torch.cat([ends.new_zeros(1), ends])
    return [*levels, bounds]


def _sums(x: Tensor, levels: list[Tensor]) -> Tensor:
    for bounds in levels:
        x = torch.segment_reduce(x, "sum", offsets=bounds, axis=0, unsafe=True)
    return x


def _carrying(sharding: Sharding, rank: int, reverse: bool) -> tuple[int, int]:
    """From which to before which of a rank's pieces there are some that others of their sequences follow."""

    def make() -> tuple[int, int]:
        _, sequence, begin, end = sharding.pieces[sharding.of_rank[rank]].unbind(1)
        follows = begin > 0 if reverse else end < sharding.cu_seqlens.diff()[sequence]
        places = follows.nonzero()[:, 0]
        return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)

    return sharding.cached(("carrying", rank, reverse), make)


def _carried(
    finals: Tensor,
    steps: Tensor,
    A: Tensor,
    pieces: Pieces,
    sharding: Sharding,
    group: Group,
    initial_states: Tensor | None,
    reverse: bool,
) -> Tensor:
    states = torch.view_as_real(finals).flatten(2) if finals.is_complex() else finals
    earlier = pieces_before(torch.cat([states, steps[..., None]], 2), sharding, group, reverse)
    earlier, steps = earlier[..., :-1], earlier[..., -1]  # [pieces, most, channels, ...]
    if finals.is_complex():
        earlier = torch.view_as_complex(earlier.unflatten(3, (-1, 2)).contiguous())
    after = torch.ops.packseq.ring_sums_beyond(steps, False)
    carried = ((after[..., None] * A).exp() * earlier).sum(1)
    if initial_states is None:
        return carried
    whole = steps.sum(1)
    return carried + (whole[..., None] * A).exp() * initial_states.index_select(0, pieces.sequences)


def states_of_sequences(
    finals: Tensor, sharding: Sharding, group: Group, initial_states: Tensor | None, reverse: bool
) -> Tensor:
    """On every rank the final states of all sequences, from those of this rank's pieces: ``[sequences, ...]``. An empty
    sequence ends as it starts."""
    last = last_pieces(finals, sharding, group, reverse)
    if initial_states is None:
        return last
    device = finals.device
    empty = sharding.cached(("empty sequences", device), lambda: (sharding.cu_seqlens.diff() == 0).to(device))
    return torch.where(empty.view(-1, *[1] * (last.dim() - 1)), initial_states, last)


def _ring_pieces(like, key, group, reverse):
    sharding, rank = Sharding.of(key), group_of(group).rank()
    mine = sharding.pieces[sharding.of_rank[rank]]
    sequences = mine[:, 1]
    before = sharding.cu_seqlens.diff()[sequences] - mine[:, 3] if reverse else mine[:, 2]
    cu_seqlens = sharding.local_cu_seqlens(rank, like.device)

    def on_device(name: str, x: Tensor) -> Tensor:
        return sharding.cached((name, rank, reverse, like.device), lambda: x.to(like.device))

    # Copies: what an operator returns is nobody else's.
    return tuple(x.clone() for x in (cu_seqlens, on_device("sequences", sequences), on_device("before", before)))


def _ring_sums_beyond(x, before):
    """Along dimension 1, of all that stands after each place, or before it."""
    x = x if before else x.flip(1)
    sums = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1).cumsum(1)
    return sums if before else sums.flip(1)


register_python_kernel("ring_pieces", _ring_pieces)
register_python_kernel("ring_sums_beyond", _ring_sums_beyond)
torch.library.register_fake("packseq::ring_sums_beyond", lambda x, before: torch.empty_like(x))
torch.library.register_autograd(
    "packseq::ring_sums_beyond",
    lambda ctx, d: (torch.ops.packseq.ring_sums_beyond(d, not ctx.before), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "before", inputs[1]),
)


@torch.library.register_fake("packseq::ring_pieces")
def _(like, key, group, reverse):
    pieces = torch.library.get_ctx().new_dynamic_size()
    empty = like.new_empty
    return (empty(pieces + 1, dtype=torch.int32), *(empty(pieces, dtype=torch.int64) for _ in range(2)))
