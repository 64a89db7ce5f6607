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
        if _few(run.lengths):
            return _final_states(rows, run.lengths, modes, reverse), steps
        return scan_modes(rows, modes, cu_seqlens=run.cu_seqlens, reverse=reverse)[1], steps

    states = states_before(summaries, modes[0], pieces, sharding, group, initial_states, reverse)
    options = {"D": D, "pre_gate": pre_gate, "gate": gate, "reverse": reverse}
    lengths = None
    if not torch.compiler.is_compiling():
        lengths = sharding.lengths[sharding.of_rank[resolve(group).rank()]].tolist()
    if not _few(lengths):
        options |= {"modes": modes, "initial_states": states, "return_final_states": return_final_states}
        out = long_conv(u, k, pieces.cu_seqlens, **options)
        if not return_final_states:
            return out
        return out[0], states_of_sequences(out[1], sharding, group, initial_states, reverse)
    out = long_conv(u, k, pieces.cu_seqlens, **options)
    if states is not None:
        response = _responses(states, lengths, modes, reverse)
        response = torch.cat([response, response.new_zeros(u.shape[0] - sum(lengths), u.shape[1])])
        out = (wide(out) + (response if gate is None else without_slack(gate) * response)).to(out.dtype)
    if not return_final_states:
        return out
    ends = _final_states(gated()[: sum(lengths)], lengths, modes, reverse)
    if states is not None:
        ends = ends + (modes[0] * pieces.cu_seqlens.diff()[:, None, None]).exp() * states
    return out, states_of_sequences(ends, sharding, group, initial_states, reverse)


_MOST_PIECES = 64  # that are taken one by one; of more each is short, and a scan goes over all of them at once


def _few(lengths: list[int] | None) -> bool:
    return lengths is not None and 1 <= len(lengths) <= _MOST_PIECES


def _final_states(rows: Tensor, lengths: list[int], modes: tuple[Tensor, Tensor, Tensor], reverse: bool) -> Tensor:
    """Of pieces that start from zeros, ``[pieces, channels, N]``: every row's power of the modes is known."""
    x, B, _ = modes
    backwards = (part if reverse else part.flip(0) for part in rows.split(lengths))
    return B * torch.stack([vandermonde_transpose(part.T, x) for part in backwards])


def _responses(states: Tensor, lengths: list[int], modes: tuple[Tensor, Tensor, Tensor], reverse: bool) -> Tensor:
    """To what the pieces start from, ``[rows, channels]``."""
    x, _, C = modes
    parts = (vandermonde_conj(v, x, n).T for v, n in zip(C * x.exp() * states, lengths, strict=True))
    return torch.cat([part.flip(0) if reverse else part for part in parts])
