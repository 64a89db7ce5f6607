"""The H3 layer over packed tokens: two state space models between three projections."""

import math

import torch
from torch import Tensor, nn

from .._boundaries import slack_rows
from .._registration import wide_dtype, widened
from ..longconv import long_conv
from .s4 import check_rows
from .ssm import DiagonalSsm, without_decay


class H3(nn.Module):
    """The H3 layer: a shift and a diagonal state space model, with gates that multiply, in place of attention.

    Tokens are packed, and no sequence sees another. With heads of one feature::

        q, k, v = in_proj(hidden)
        k       = long_conv(k, shift)               the last shift_states tokens: what stood just before
        y       = q * long_conv(k * v, diagonal)    the gates are part of the convolution
        out     = out_proj(y)

    Wider heads multiply k and v of a head, ``head_dim x head_dim`` products, and sum those with q.

    Args:
        d_model: features of a token, in and out.
        l_max: the taps of the diagonal model's filter where :meth:`forward` is not told ``max_length``.
        d_state: real numbers of the diagonal model's state, one model a head; even.
        shift_states: how many tokens the shift reaches back.
        head_dim: features of a head; divides ``d_model``.
        init: of the diagonal model, see :class:`packseq.nn.S4D`.
        bias: whether the projections have one.
        dt_min, dt_max, device, dtype: as in :class:`packseq.nn.S4`.

    Raises:
        ValueError: an option or an argument has the wrong shape, dtype, device or value.

    Source: Fu et al., arXiv 2212.14052.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        d_state: int = 64,
        *,
        shift_states: int = 64,
        head_dim: int = 1,
        init: str = "legs",
        bias: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or l_max < 1 or shift_states < 1:
            got = f"got {d_model}, {l_max} and {shift_states}"
            raise ValueError(f"H3: d_model, l_max and shift_states must be positive, {got}")
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"H3: head_dim must divide d_model = {d_model}, got {head_dim}")
        self.d_model, self.l_max, self.head_dim, self.heads = d_model, l_max, head_dim, d_model // head_dim
        where, wide = {"device": device, "dtype": dtype}, {"device": device, "dtype": wide_dtype(dtype)}
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, **where)
        self.shift = nn.Parameter(torch.randn(d_model, shift_states, **wide) / math.sqrt(shift_states))
        self.shift_D = nn.Parameter(torch.randn(d_model, **wide))
        without_decay(self.shift, self.shift_D)
        self.ssm = DiagonalSsm(self.heads, d_state, init=init, dt_min=dt_min, dt_max=dt_max, **wide)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, **where)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor | None = None, *, max_length: int | None = None) -> Tensor:
        """``[total, d_model]`` of packed tokens; zeros in rows after ``cu_seqlens[-1]``.

        Args:
            hidden: ``[total, d_model]``. What stands after ``cu_seqlens[-1]`` is not used.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``, on the same device; None: one sequence.
            max_length: no sequence is longer; any number. ``l_max`` by default.
        """
        taps = check_rows(self, hidden, cu_seqlens, max_length)
        slack = slack_rows(cu_seqlens, hidden.shape[0])
        if slack is not None:  # their gradients are zeros, but zeros times NaN are not
            hidden = hidden.masked_fill(slack[:, None], 0)
        q, k, v = self.in_proj(hidden).chunk(3, dim=1)
        k = long_conv(k, widened(self.shift), cu_seqlens, D=widened(self.shift_D))
        filter, D = self.ssm.filter(taps)[0], self.ssm.skip()
        if self.head_dim == 1:
            y = long_conv(v, filter, cu_seqlens, D=D, pre_gate=k, gate=q)
        else:
            y = self._mix_heads(q, k, v, filter, D, cu_seqlens)
        out = self.out_proj(y)
        return out if slack is None or self.out_proj.bias is None else out.masked_fill(slack[:, None], 0)

    def _mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, filter: Tensor, D: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Each product of a feature of k and one of v is a channel; those of a head share its filter."""
        size = self.head_dim

        def channels(x: Tensor, other: int) -> Tensor:
            heads = x.unflatten(1, (self.heads, size)).unsqueeze(other)
            return heads.expand(-1, -1, size, size).flatten(1)

        filter, D = (x.repeat_interleave(size * size, dim=0) for x in (filter, D))
        options = {"D": D, "pre_gate": channels(k, -1), "gate": channels(q, -1)}
        y = long_conv(channels(v, -2), filter, cu_seqlens, **options)
        return y.unflatten(1, (self.heads, size, size)).sum(dim=2).flatten(1)
