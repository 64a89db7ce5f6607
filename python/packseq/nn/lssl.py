"""The LSSL layer over packed tokens: a state space model with a dense state matrix, for small sizes."""

import torch
from torch import Tensor, nn

from .._registration import wide_dtype, widened
from .hippo import hippo
from .s4 import ConvolutionLayer
from .ssm import log_steps, without_decay


class LSSL(ConvolutionLayer):
    """The LSSL layer: ``x' = A x + B u``, ``y = C x + D u`` with a dense A, which is trained.

    A and B are shared by all channels; each has its own step size, C and D. The filter is written out by powers of the
    discrete A, ``d_model * d_state * taps`` numbers, so this is for small sizes; and what :class:`packseq.nn.S4`, which
    does the same by other means, can be held against. See :class:`ConvolutionLayer` for what is around it.

    Args:
        d_model: features of a token, in and out; each is a channel.
        l_max: the taps of the filter where :meth:`forward` is not told ``max_length``.
        d_state: real numbers of a channel's state.
        init: of A and B: ``"legs"``, ``"legt"`` or ``"fourier"``, see :func:`packseq.nn.hippo.hippo`.
        glu, dropout, dt_min, dt_max, device, dtype: as in :class:`packseq.nn.S4`.

    Raises:
        ValueError: an option or an argument has the wrong shape, dtype, device or value.

    Source: Gu et al., arXiv 2110.13985.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        d_state: int = 16,
        *,
        init: str = "legs",
        glu: bool = True,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, l_max, glu, dropout, {"device": device, "dtype": dtype})
        where = {"device": device, "dtype": wide_dtype(dtype)}
        A, B = hippo(init, d_state)
        self.A, self.B = nn.Parameter(A.to(**where)), nn.Parameter(B.to(**where))
        self.C = nn.Parameter(torch.randn(d_model, d_state, **where))
        self.D = nn.Parameter(torch.randn(d_model, **where))
        self.log_dt = log_steps(d_model, dt_min, dt_max, where)
        without_decay(self.A, self.B, self.C, self.D, self.log_dt)

    def filters(self, taps: int) -> tuple[Tensor]:
        """``[d_model, taps]``: C times the Krylov matrix B, A B, A A B and so on, of the bilinear transform."""
        A, B, C, dt = widened(self.A), widened(self.B), widened(self.C), widened(self.log_dt).exp()
        identity = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        half = dt[:, None, None] / 2 * A
        # solve_ex, unlike solve, does not wait for the device to see whether it could.
        power = torch.linalg.solve_ex(identity - half, identity + half).result
        krylov = torch.linalg.solve_ex(identity - half, (dt[:, None] * B)[..., None]).result
        while krylov.shape[-1] < taps:  # as many again by one product, then the power for twice as many
            krylov = torch.cat([krylov, power @ krylov[..., : taps - krylov.shape[-1]]], dim=-1)
            if krylov.shape[-1] < taps:
                power = power @ power
        return ((C[:, None] @ krylov)[:, 0],)

    def skip(self) -> Tensor:
        return widened(self.D)
