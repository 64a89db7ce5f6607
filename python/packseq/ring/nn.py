"""Modules over sequences that are spread over ranks."""

from torch import Tensor

from .. import nn
from .._boundaries import slack_rows
from .carry import pieces_of
from .groups import Group
from .scan import ring_causal_conv1d, ring_selective_scan
from .sharding import Sharding


class Mamba(nn.Mamba):
    """:class:`packseq.nn.Mamba`, its weights and its initialisation, over sequences that are spread over ranks."""

    def forward(self, hidden: Tensor, sharding: Sharding, group: Group = None, *, reverse: bool = False) -> Tensor:
        """``[rows, d_model]`` of this rank's rows; zeros in slack rows.

        Args:
            hidden: ``[rows, d_model]``, as :meth:`Sharding.shard` deals rows out; more are slack and not used.
            sharding, group, reverse: as in :func:`packseq.ring.ring_selective_scan`, which says too how the gradients
                of weights add up.
        """
        self._check(hidden, None)
        slack = slack_rows(pieces_of(sharding, group, hidden, reverse).cu_seqlens, hidden.shape[0])[:, None]
        x, z = self.in_proj(hidden.masked_fill(slack, 0)).chunk(2, dim=1)
        where = {"sharding": sharding, "group": group, "reverse": reverse}
        u = ring_causal_conv1d(x, *self._filter(), activation="silu", **where)
        y = ring_selective_scan(u, *self._selection(u), z=z, **self._constants(), **where)
        return self.out_proj(y).masked_fill(slack, 0)
