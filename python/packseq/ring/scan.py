"""Mamba's selective scan and its convolution over sequences that are spread over ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._boundaries import slack_rows
from .._registration import widened
from ..scan import causal_conv1d, selective_scan
from .carry import PieceRun, pieces_of, states_before, states_of_sequences
from .gather import halo
from .groups import Group
from .sharding import Sharding


def ring_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    sharding: Sharding,
    group: Group = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`packseq.selective_scan` of a batch whose rows are spread over ranks; every rank calls it with its own.

    Each rank scans those of its pieces that others go on from, from zeros, for their final states alone. Those, and how
    far each piece decays what it starts from, go to the ranks that have later pieces of the same sequences. From both
    each rank has the states that its pieces start from, and scans for the outputs: no rank waits for another's scan.

    Args:
        u, delta, z: this rank's rows, as :meth:`Sharding.shard` deals them out; more are slack. Token-dependent ``B``
            and ``C`` likewise.
        A, D, delta_bias, delta_softplus, return_final_states, reverse: as in :func:`packseq.selective_scan`.
        sharding: the same on every rank.
        group: the ranks, as many as the sharding's: a process group, a mesh of one dimension, or None for all.
        initial_states: of all sequences, the same on every rank.

    Returns:
        ``out [rows, channels]``, or ``(out, final_states)``, these of all sequences on every rank. What several ranks
        are given, parameters and states, has as its gradient on each what that rank's rows give; the whole one is the
        sum over the ranks.

    Raises:
        ValueError, NotImplementedError: as :func:`packseq.selective_scan`.
        RuntimeError: a rank is lost, or did not answer within the group's timeout.
    """
    pieces = pieces_of(sharding, group, u, reverse)
    options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "reverse": reverse}

    def summaries(run: PieceRun) -> tuple[Tensor, Tensor]:
        rows = u[run.rows], delta[run.rows], A, *(x[run.rows] if x.dim() == 3 else x for x in (B, C))
        _, finals = selective_scan(*rows, run.cu_seqlens, return_final_states=True, **options)
        steps = rows[1]
        if run.lengths is None:  # compiled: slack rows are among them
            steps = steps.masked_fill(slack_rows(run.cu_seqlens, len(steps))[:, None], 0)
        return finals, run.sums(_step_sizes(steps, delta_bias, delta_softplus, A))

    states = states_before(summaries, A, pieces, sharding, group, initial_states, reverse)
    options |= {"D": D, "z": z, "initial_states": states, "return_final_states": return_final_states}
    out = selective_scan(u, delta, A, B, C, pieces.cu_seqlens, **options)
    if not return_final_states:
        return out
    return out[0], states_of_sequences(out[1], sharding, group, initial_states, reverse)


def ring_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sharding: Sharding,
    group: Group = None,
    *,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`packseq.causal_conv1d` of a batch whose rows are spread over ranks; every rank calls it with its own.

    The ``width - 1`` rows before each piece come from the ranks that have them, be they on several.

    Args:
        x: this rank's rows, as :meth:`Sharding.shard` deals them out; more are slack.
        weight, bias, activation, return_final_states, reverse: as in :func:`packseq.causal_conv1d`.
        sharding, group, initial_states: as in :func:`ring_selective_scan`.

    Returns, Raises:
        as :func:`ring_selective_scan`.
    """
    pieces = pieces_of(sharding, group, x, reverse)
    width = weight.shape[-1]
    states = halo(x, sharding, group, width - 1, reverse).transpose(1, 2)
    if initial_states is not None:
        place = pieces.before[:, None] + torch.arange(width - 1, device=x.device)
        given = initial_states.index_select(0, pieces.sequences)
        from_given = place.clamp(max=width - 2)[:, None].expand_as(given)
        states = torch.where((place < width - 1)[:, None], given.gather(2, from_given), states)
    options = {"activation": activation, "return_final_states": return_final_states, "reverse": reverse}
    out = causal_conv1d(x, widened(weight), widened(bias), pieces.cu_seqlens, initial_states=states, **options)
    if not return_final_states:
        return out
    return out[0], states_of_sequences(out[1], sharding, group, initial_states, reverse)


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool, A: Tensor) -> Tensor:
    """As the scan has them, in the states' real dtype."""
    steps = delta.to(A.real.dtype)
    steps = steps if bias is None else steps + bias
    return F.softplus(steps) if softplus else steps
