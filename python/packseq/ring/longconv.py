"""The long convolution over sequences that are spread over ranks, where the filter is a state space model's."""

import torch
from torch import Tensor

from .._boundaries import slack_rows
from ..filters import vandermonde_conj, vandermonde_transpose
from ..longconv import check_modes, long_conv, scan_modes, wide
from .carry import PieceRun, pieces_of, states_before, states_of_sequences
from .groups import Group, resolve
from .sharding import Sharding


def ring_long_conv(
    u: Tensor,
    k: Tensor,
    modes: tuple[Tensor, Tensor, Tensor],
    sharding: Sharding,
    group: Group = None,
    *,
    D: Tensor | None = None,
    pre_gate: Tensor | None = None,
    gate: Tensor | None = None,
    reverse: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`packseq.long_conv` of a batch whose rows are spread over ranks; every rank calls it with its own.

    Each rank convolves its pieces alone. What earlier pieces of a sequence leave behind is N states of the model that
    the filter is of, whatever their length: these travel, and their response is added.

    Args:
        u, pre_gate, gate: this rank's rows, as :meth:`Sharding.shard` deals them out; more are slack.
        k: the filter, as long as the longest piece, and what it is made of:
        modes: ``(x, B, C)``, as in :func:`packseq.long_conv`.
        D, reverse, return_final_states: as in :func:`packseq.long_conv`.
        sharding, group, initial_states: as in :func:`packseq.ring.ring_selective_scan`.

    Returns, Raises:
        as :func:`packseq.ring.ring_selective_scan`.
    """
    check_modes(modes, u, None)
    pieces = pieces_of(sharding, group, u, reverse)
    slack = slack_rows(pieces.cu_seqlens, u.shape[0])[:, None]  # NaN must not come from there

    def without_slack(x: Tensor) -> Tensor:
        return wide(x.masked_fill(slack, 0))

    def gated() -> Tensor:
        return without_slack(u) if pre_gate is None else without_slack(pre_gate) * without_slack(u)

    def summaries(run: PieceRun) -> tuple[Tensor, Tensor]:
        rows = gated()[run.rows]
        steps = run.cu_seqlens.diff().to(rows.dtype)[:, None].expand(-1, u.shape[1])
        return _final_states(rows, run.cu_seqlens, run.lengths, modes, reverse), steps

    states = states_before(summaries, modes[0], pieces, sharding, group, initial_states, reverse)
    options = {"D": D, "pre_gate": pre_gate, "gate": gate, "reverse": reverse}
    if torch.compiler.is_compiling():
        options |= {"modes": modes, "initial_states": states, "return_final_states": return_final_states}
        out = long_conv(u, k, pieces.cu_seqlens, **options)
        if not return_final_states:
            return out
        return out[0], states_of_sequences(out[1], sharding, group, initial_states, reverse)
    rank = resolve(group).rank()
    lengths = sharding.lengths[sharding.of_rank[rank]].tolist()
    out = long_conv(u, k, pieces.cu_seqlens, **options)
    if states is not None:
        response = _responses(states, u.shape[0], pieces.cu_seqlens, lengths, modes, reverse)
        response = response if gate is None else without_slack(gate) * response
        starts = _rows_that_start(sharding, rank, u, initial_states, reverse)
        out = torch.where(starts, (wide(out) + response).to(out.dtype), out)
    if not return_final_states:
        return out
    ends = _final_states(gated()[: sum(lengths)], pieces.cu_seqlens, lengths, modes, reverse)
    if states is not None:
        ends = ends + (modes[0] * pieces.cu_seqlens.diff()[:, None, None]).exp() * states
    return out, states_of_sequences(ends, sharding, group, initial_states, reverse)


# A piece of so many rows is taken by itself: every row's power of the modes is known. A scan goes over the shorter ones
# together. Which, a piece's own length says, so that its results do not depend on what else there is.
_LONG = 512


def _final_states(
    rows: Tensor, cu_seqlens: Tensor, lengths: list[int] | None, modes: tuple[Tensor, Tensor, Tensor], reverse: bool
) -> Tensor:
    """Of pieces that start from zeros, ``[pieces, channels, N]``. Without lengths, which nobody knows where it is
    compiled, a scan goes over all."""
    x, B, _ = modes
    scanned = None
    if not lengths or min(lengths) < _LONG:
        scanned = scan_modes(rows, modes, cu_seqlens=cu_seqlens, reverse=reverse)[1]
    if not lengths or max(lengths) < _LONG:
        return scanned
    finals = []
    for i, part in enumerate(rows.split(lengths)):
        backwards = part if reverse else part.flip(0)
        finals.append(scanned[i] if lengths[i] < _LONG else B * vandermonde_transpose(backwards.T, x))
    return torch.stack(finals)


def _rows_that_start(
    sharding: Sharding, rank: int, like: Tensor, initial_states: Tensor | None, reverse: bool
) -> Tensor:
    """Which of the rows of ``like`` are of pieces that start from a state, ``[rows, 1]``."""

    def make() -> Tensor:
        pieces = sharding.pieces[sharding.of_rank[rank]]
        starts = pieces[:, 3] < sharding.cu_seqlens.diff()[pieces[:, 1]] if reverse else pieces[:, 2] > 0
        starts = starts if initial_states is None else torch.ones_like(starts)
        of_pieces = starts.repeat_interleave(pieces[:, 3] - pieces[:, 2])
        slack = of_pieces.new_zeros(like.shape[0] - len(of_pieces))
        return torch.cat([of_pieces, slack])[:, None].to(like.device)

    return sharding.cached(("starts", rank, reverse, initial_states is None, like.shape[0], like.device), make)


def _responses(
    states: Tensor,
    total: int,
    cu_seqlens: Tensor,
    lengths: list[int],
    modes: tuple[Tensor, Tensor, Tensor],
    reverse: bool,
) -> Tensor:
    """To what the pieces start from, ``[total, channels]``. Of all, zeros too: every rank's gradient must come to where
    the states are exchanged."""
    x, _, C = modes
    scanned = states.real.new_zeros(1, states.shape[1]).expand(total, -1)
    if not lengths or min(lengths) < _LONG:
        scanned = scan_modes(scanned, modes, cu_seqlens=cu_seqlens, initial_states=states, reverse=reverse)[0]
    if not lengths or max(lengths) < _LONG:
        return scanned
    responses = list(scanned.split([*lengths, total - sum(lengths)]))
    for i, n in enumerate(lengths):
        if n >= _LONG:
            response = vandermonde_conj(C * x.exp() * states[i], x, n).T
            responses[i] = response.flip(0) if reverse else response
    return torch.cat(responses)
