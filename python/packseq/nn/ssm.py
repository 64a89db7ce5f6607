"""The state space models inside S4, S4D and H3: their parameters, and the filters and recurrences that these make.

Complex parameters are kept as pairs of real numbers in a last dimension, so that a module's ``to(dtype)`` cannot drop
their imaginary parts. Half types are computed with in float32.
"""

import math

import torch
from torch import Tensor, nn

from .._registration import wide_dtype, widened
from ..filters import s4_filter, s4d_filter, s4d_modes
from ..longconv import s4_step
from .hippo import diagonal, diagonal_plus_low_rank

# Of a pole that a HiPPO matrix has on the imaginary axis. Its decay is kept as a logarithm; and where a pole meets a
# node of the filter's transform, diagonal and low-rank part cancel: at 1e-4 that would cost float32 two digits more.
_LEAST_DECAY = 0.01
_CHANNELS_AT_ONCE = 64  # whose dense matrices are in memory together


class StateSpace(nn.Module):
    """What a channel's state space model has, whichever its state matrix: poles w, B, C, D and a step size."""

    def __init__(
        self, w: Tensor, B: Tensor, channels: int, filters: int, dt: tuple[float, float], where: dict[str, object]
    ) -> None:
        super().__init__()
        self.A_real_log = nn.Parameter((-w.real).clamp(min=_LEAST_DECAY).log().repeat(channels, 1).to(**where))
        self.A_imag = nn.Parameter(w.imag.repeat(channels, 1).to(**where))
        self.B = nn.Parameter(torch.view_as_real(B.repeat(channels, 1)).to(**where))
        self.C = nn.Parameter(torch.randn(filters, channels, len(w), 2, **where) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(channels, **where))
        self.log_dt = log_steps(channels, *dt, where)

    def poles(self) -> Tensor:
        """w, complex ``[channels, d_state / 2]``."""
        return torch.complex(-widened(self.A_real_log).exp(), widened(self.A_imag))

    def dt(self) -> Tensor:
        return widened(self.log_dt).exp()

    def skip(self) -> Tensor:
        """D."""
        return widened(self.D)

    def allocate_states(self, slots: int) -> Tensor:
        """A pool of zeros, complex ``[slots, channels, d_state / 2]``."""
        poles = self.A_imag
        return poles.new_zeros(slots, *poles.shape, dtype=wide_dtype(poles.dtype).to_complex())


class DiagonalSsm(StateSpace):
    """For each channel a state space model ``h' = diag(w) h + B u``, ``y = 2 Re(C h) + D u``.

    Args:
        channels: each with its own parameters.
        d_state: real numbers of a channel's state; even, as half as many complex ones are kept.
        filters: how many outputs share a state, each with its C.
        init: of w and B, see :func:`packseq.nn.hippo.diagonal`.
        discretization: ``"zoh"`` or ``"bilinear"``.
        dt_min, dt_max: between which step sizes start, evenly in their logarithm.
    """

    def __init__(
        self,
        channels: int,
        d_state: int,
        filters: int = 1,
        *,
        init: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f'DiagonalSsm: discretization must be "zoh" or "bilinear", got {discretization!r}')
        where = {"device": device, "dtype": dtype}
        super().__init__(*diagonal(init, d_state), channels, filters, (dt_min, dt_max), where)
        self.discretization = discretization
        without_decay(*self.parameters())

    def filter(self, length: int) -> Tensor:
        """The first ``length`` taps, ``[filters, channels, length]``."""
        return s4d_filter(
            self.poles(), as_complex(self.B), as_complex(self.C), self.dt(), length, discretization=self.discretization
        )

    def modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the first filter is made of, as :func:`packseq.long_conv` takes it."""
        x, B = s4d_modes(self.poles(), as_complex(self.B), self.dt(), discretization=self.discretization)
        return x, B, as_complex(self.C)[0]

    def step(self, states: Tensor, u: Tensor, cu_seqlens: Tensor | None, indices: Tensor | None) -> Tensor:
        """The recurrence of the first filter: see :func:`packseq.s4_step`."""
        return s4_step(
            *(states, u, self.poles(), as_complex(self.B), as_complex(self.C)[0], self.dt(), cu_seqlens),
            **{"D": self.skip(), "discretization": self.discretization, "indices": indices},
        )


class DplrSsm(StateSpace):
    """As :class:`DiagonalSsm`, with ``A = diag(w) - P P^*`` and the bilinear transform.

    In place of C it keeps what makes a filter of ``length`` taps without powers of A, ``C (I - Abar^length)``: see
    :func:`packseq.s4_filter`. Shorter filters are the first taps of that one; :meth:`set_length` makes longer ones.
    ``length`` goes through state dicts. Its filter is no sum of few modes: states come from :meth:`step`.

    Args:
        length: the most taps.
        init: of w, P and B, see :func:`packseq.nn.hippo.diagonal_plus_low_rank`.
        channels, d_state, filters, dt_min, dt_max: as in :class:`DiagonalSsm`.
    """

    discretization = "bilinear"

    def __init__(
        self,
        channels: int,
        d_state: int,
        length: int,
        filters: int = 1,
        *,
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        where = {"device": device, "dtype": dtype}
        form = diagonal_plus_low_rank(init, d_state)
        super().__init__(form.w, form.B, channels, filters, (dt_min, dt_max), where)
        self.P = nn.Parameter(torch.view_as_real(form.P[:, None].repeat(1, channels, 1)).to(**where))
        without_decay(*self.parameters())
        self.length = 0  # C is the model's own so far
        self.set_length(length)

    @torch.no_grad()
    def set_length(self, length: int) -> None:
        """From now on filters have up to ``length`` taps; the model, and so their first taps, stay what they are."""
        if length < 1:
            raise ValueError(f"DplrSsm: length must be positive, got {length}")
        self.C.copy_(torch.view_as_real(self._rows(self.length, length)))
        self.length = length

    @torch.no_grad()
    def output_rows(self) -> Tensor:
        """The model's own C, complex ``[filters, channels, d_state / 2]``, for the recurrence; it takes time."""
        return self._rows(self.length, 0).to(as_complex(self.C).dtype)

    def filter(self, length: int) -> Tensor:
        """The first ``length`` taps, ``[filters, channels, length]``."""
        if length > self.length:
            advice = "set_length() makes longer ones"
            raise ValueError(f"DplrSsm: the filter has {self.length} taps and {length} were asked for: {advice}")
        k = s4_filter(
            *(self.poles(), as_complex(self.B), as_complex(self.C), self.dt(), self.length), P=as_complex(self.P)
        )
        return k[..., :length]

    def step(self, states: Tensor, u: Tensor, cu_seqlens: Tensor | None, indices: Tensor | None, C: Tensor) -> Tensor:
        """The recurrence of the first filter; ``C``: from :meth:`output_rows`."""
        return s4_step(
            *(states, u, self.poles(), as_complex(self.B), C[0], self.dt(), cu_seqlens),
            **{"P": as_complex(self.P), "D": self.skip(), "indices": indices},
        )

    def _rows(self, before: int, after: int) -> Tensor:
        """C, which is for filters of `before` taps, for those of `after`; 0: the model's own. In float64."""
        poles, P, dt = self.poles().to(torch.complex128), as_complex(self.P).to(torch.complex128), self.dt().double()
        C = as_complex(self.C).to(torch.complex128)
        parts = []
        n = _CHANNELS_AT_ONCE
        for w, p, d, c in zip(poles.split(n), P.split(n, dim=1), dt.split(n), C.split(n, dim=1), strict=True):
            Abar = _bilinear(_real_matrix(w, p), d)
            rows = torch.cat([c.real, -c.imag], dim=-1).transpose(0, 1)  # 2 Re(C h) is twice these times (Re h, Im h)
            identity = torch.eye(Abar.shape[-1], dtype=Abar.dtype, device=Abar.device)
            if before:
                rows = torch.linalg.solve(identity - torch.linalg.matrix_power(Abar, before), rows, left=False)
            if after:
                rows = rows - rows @ torch.linalg.matrix_power(Abar, after)
            real, imag = rows.transpose(0, 1).chunk(2, dim=-1)
            parts.append(torch.complex(real.contiguous(), -imag.contiguous()))
        return torch.cat(parts, dim=1)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.length)

    def set_extra_state(self, state: Tensor) -> None:
        self.length = int(state)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(widened(x).contiguous())


def log_steps(channels: int, least: float, most: float, where: dict[str, object]) -> nn.Parameter:
    """Of step sizes: spread evenly in their logarithm."""
    return nn.Parameter(torch.empty(channels, **where).uniform_(math.log(least), math.log(most)))


def without_decay(*parameters: nn.Parameter) -> None:
    """Marks them as mamba-ssm marks the scan's own parameters."""
    for parameter in parameters:
        parameter._no_weight_decay = True


def _real_matrix(w: Tensor, P: Tensor) -> Tensor:
    """diag(w) - P P^* over both halves of the conjugate pairs, as it acts on (Re h, Im h): ``[channels, 2 N, 2 N]``.

    With h its other half is conj(h), so h' = direct h + mixed conj(h).
    """
    columns = P.movedim(0, -1)
    direct, mixed = torch.diag_embed(w) - columns @ columns.mH, -columns @ columns.mT
    above = torch.cat([direct.real + mixed.real, mixed.imag - direct.imag], dim=-1)
    below = torch.cat([direct.imag + mixed.imag, direct.real - mixed.real], dim=-1)
    return torch.cat([above, below], dim=-2)


def _bilinear(A: Tensor, dt: Tensor) -> Tensor:
    half = dt[:, None, None] / 2 * A
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(identity - half, identity + half)
