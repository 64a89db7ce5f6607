"""The long convolution over sequences that are spread over ranks, where the filter is a state space model's."""

from torch import Tensor

from .._boundaries import slack_rows
from ..longconv import check_modes, long_conv, scan_modes, wide
from .carry import pieces_of, states_before, states_of_sequences
from .groups import Group
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

    def summaries(cu_seqlens: Tensor, of: slice, _) -> tuple[Tensor, Tensor]:
        slack = slack_rows(pieces.cu_seqlens, u.shape[0])[:, None]  # NaN must not come from there
        rows = wide(u.masked_fill(slack, 0))
        rows = rows if pre_gate is None else wide(pre_gate.masked_fill(slack, 0)) * rows
        _, finals = scan_modes(rows[of], modes, cu_seqlens=cu_seqlens, reverse=reverse)
        return finals, cu_seqlens.diff().to(rows.dtype)[:, None].expand(-1, u.shape[1])

    states = states_before(summaries, modes[0], pieces, sharding, group, initial_states, reverse)
    options = {"D": D, "pre_gate": pre_gate, "gate": gate, "reverse": reverse, "modes": modes}
    options |= {"initial_states": states, "return_final_states": return_final_states}
    out = long_conv(u, k, pieces.cu_seqlens, **options)
    if not return_final_states:
        return out
    return out[0], states_of_sequences(out[1], sharding, group, initial_states, reverse)
