"""The Mamba block over packed tokens: training, prefilling and step-by-step decoding."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._boundaries import slack_rows
from .._registration import wide_dtype
from ..scan import causal_conv1d, causal_conv1d_step, mamba_inner, selective_scan, selective_scan_step
from .rows import check_boundaries


class MambaStates(NamedTuple):
    """What a block remembers of each of ``n`` sequences; or a pool of ``n`` slots that sequences come to and leave."""

    conv: Tensor  # [n, d_inner, d_conv - 1], the newest token last, in the dtype of the inputs
    scan: Tensor  # [n, d_inner, d_state], float32 (float64 where the inputs are)


class Mamba(nn.Module):
    """The Mamba block: projection, short convolution, selective scan, gate, projection.

    It is mamba-ssm's block with the same parameter names and initialisation, so that its state dicts load, and those
    of Hugging Face's mixer. Tokens are packed, and no sequence sees another::

        x, z     = in_proj(hidden)
        u        = silu(conv1d(x))
        dt, B, C = x_proj(u)
        y        = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D, z)
        out      = out_proj(y)

    Args:
        d_model: features of a token, in and out.
        d_state: states of each channel of the scan, 1 to 256.
        d_conv: width of the convolution, 2 to 8.
        expand: ``d_inner``, the channels of convolution and scan, is ``expand * d_model``.
        dt_rank: features from which the step sizes are projected; ``"auto"``: a 16th of ``d_model``, rounded up.
        dt_min, dt_max, dt_init_floor: between which step sizes start, evenly in their logarithm, and their least.
        dt_init, dt_scale: how ``dt_proj.weight`` starts: ``"random"`` or ``"constant"``, and how large.
        conv_bias, bias: whether the convolution, and the two outer projections, have a bias.

    ``A_log`` and ``D`` are float32 whatever ``dtype`` is, and marked as mamba-ssm marks them (``_no_weight_decay``),
    as ``dt_proj.bias`` is (``_no_reinit``).

    Raises:
        ValueError: an option or an argument has the wrong shape, dtype, device or value.

    Source: Gu and Dao, arXiv 2312.00752.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba: dt_init must be "random" or "constant", got {dt_init!r}')
        if not 1 <= d_state <= 256:
            raise ValueError(f"Mamba: d_state must be 1 to 256, got {d_state}")
        if not 2 <= d_conv <= 8:
            raise ValueError(f"Mamba: d_conv must be 2 to 8, got {d_conv}")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        where = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias, **where)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **where)
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(rates.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        self._initialize_dt(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_log._no_weight_decay = self.D._no_weight_decay = self.dt_proj.bias._no_reinit = True

    @torch.no_grad()
    def _initialize_dt(self, least: float, most: float, init: str, scale: float, floor: float) -> None:
        std = scale * self.dt_rank**-0.5
        if init == "constant":
            nn.init.constant_(self.dt_proj.weight, std)
        else:
            nn.init.uniform_(self.dt_proj.weight, -std, std)
        low, high = math.log(least), math.log(most)
        dt = torch.empty_like(self.dt_proj.bias, dtype=torch.float32).uniform_(low, high).exp().clamp(min=floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # of which softplus is dt again

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        reverse: bool = False,
        initial_states: MambaStates | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, MambaStates]:
        """``[total, d_model]`` of packed tokens; zeros in rows after ``cu_seqlens[-1]``.

        Args:
            hidden: ``[total, d_model]``. What stands after ``cu_seqlens[-1]`` is not used.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``, on the same device; None: one sequence.
            reverse: each sequence from its end to its start, as the second half of a bidirectional model wants it.
            initial_states: of each sequence, from which it goes on; zeros by default.
            return_final_states: also return the states after the last token: to go on from, or to fill a pool with.
                Gradients flow through them, and through ``initial_states``.
        """
        self._check(hidden, cu_seqlens)
        slack = slack_rows(cu_seqlens, hidden.shape[0])
        if slack is not None:  # their gradients are zeros, but zeros times NaN are not
            hidden = hidden.masked_fill(slack[:, None], 0)
        out, states = self.mix(hidden, cu_seqlens, reverse, initial_states, return_final_states)
        if slack is not None and self.out_proj.bias is not None:
            out = out.masked_fill(slack[:, None], 0)
        return out if states is None else (out, states)

    def mix(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor | None,
        reverse: bool = False,
        initial_states: MambaStates | None = None,
        return_final_states: bool = False,
    ) -> tuple[Tensor, MambaStates | None]:
        """:meth:`forward` for a model that has checked its input and keeps its slack rows finite itself."""
        xz = self.in_proj(hidden)
        if initial_states is None and not return_final_states:
            return self._mix_without_states(xz, cu_seqlens, reverse), None
        options = {"reverse": reverse, "return_final_states": True}
        start = initial_states or MambaStates(None, None)
        x, z = xz.chunk(2, dim=1)
        u, conv = causal_conv1d(x, *self._filter(), cu_seqlens, activation="silu", initial_states=start.conv, **options)
        y, scan = selective_scan(
            u, *self._selection(u), cu_seqlens, z=z, initial_states=start.scan, **self._constants(), **options
        )
        return self.out_proj(y), MambaStates(conv, scan) if return_final_states else None

    def _mix_without_states(self, xz: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
        """As one operator, which keeps less for the backward."""
        return mamba_inner(
            xz,
            *self._filter(),
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self._rates(),
            self._wide(self.D),
            self._wide(self.dt_proj.bias),
            cu_seqlens,
            out_proj_bias=self.out_proj.bias,
            reverse=reverse,
        )

    @torch.no_grad()
    def step(
        self,
        hidden: Tensor,
        states: MambaStates,
        cu_seqlens: Tensor | None = None,
        *,
        indices: Tensor | None = None,
    ) -> Tensor:
        """The next token, or few, of many sequences; their states are updated in place. No gradients.

        Args:
            hidden: ``[total, d_model]``, one row a sequence, or as ``cu_seqlens`` says.
            states: a pool, from :meth:`allocate_states`, or the final states of a prefill.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``; None: one token a sequence.
            indices: int32 ``[sequences]``: the slot of each sequence in the pool, no two the same. A negative one skips
                its sequence: no state changes, and what comes back means nothing. None: sequence ``i`` has slot ``i``.

        Returns:
            ``[total, d_model]``.
        """
        self._check(hidden, cu_seqlens)
        return self.mix_step(hidden, states, cu_seqlens, indices)

    def mix_step(
        self, hidden: Tensor, states: MambaStates, cu_seqlens: Tensor | None, indices: Tensor | None
    ) -> Tensor:
        """:meth:`step` for a model that has checked its input."""
        x, z = self.in_proj(hidden).chunk(2, dim=1)
        u = causal_conv1d_step(states.conv, x, *self._filter(), cu_seqlens, indices=indices, activation="silu")
        y = selective_scan_step(
            states.scan, u, *self._selection(u), cu_seqlens, indices=indices, z=z, **self._constants()
        )
        return self.out_proj(y)

    def allocate_states(self, slots: int, dtype: torch.dtype | None = None) -> MambaStates:
        """A pool of zeros for :meth:`step`, on the weights' device. ``dtype``: of the inputs; the weights' by default.

        Zeros are where a sequence starts. A slot that goes to another sequence must be zeroed again, or filled with
        the final states of a prefill.
        """
        weight = self.in_proj.weight
        dtype = dtype or weight.dtype
        return MambaStates(
            weight.new_zeros(slots, self.d_inner, self.d_conv - 1, dtype=dtype),
            weight.new_zeros(slots, self.d_inner, self.d_state, dtype=wide_dtype(dtype)),
        )

    def _wide(self, parameter: Tensor | None) -> Tensor | None:
        """As the operators want their parameters: float32 also where the inputs are of half types."""
        return None if parameter is None else parameter.to(wide_dtype(self.in_proj.weight.dtype))

    def _filter(self) -> tuple[Tensor, Tensor | None]:
        return self._wide(self.conv1d.weight[:, 0]), self._wide(self.conv1d.bias)

    def _rates(self) -> Tensor:
        """The matrix A."""
        return -self._wide(self.A_log).exp()

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The step sizes and the matrices A, B and C."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=1)
        return F.linear(dt, self.dt_proj.weight), self._rates(), B.unsqueeze(1), C.unsqueeze(1)

    def _constants(self) -> dict[str, object]:
        return {"D": self._wide(self.D), "delta_bias": self._wide(self.dt_proj.bias), "delta_softplus": True}

    def _check(self, hidden: Tensor, cu_seqlens: Tensor | None) -> None:
        if hidden.dim() != 2 or hidden.shape[1] != self.d_model or not hidden.is_floating_point():
            got = f"got {tuple(hidden.shape)} of {hidden.dtype}"
            raise ValueError(f"Mamba: hidden must be packed, [total, {self.d_model}], floating point, {got}")
        if cu_seqlens is not None:
            check_boundaries("Mamba", cu_seqlens, hidden.shape[0], hidden.device)
