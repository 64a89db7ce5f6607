"""S4 and S4D over packed tokens: training by convolution, and the recurrence token by token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._boundaries import slack_rows
from .._registration import wide_dtype
from ..longconv import long_conv
from .rows import check_boundaries, contents_may_be_checked
from .ssm import DiagonalSsm, DplrSsm


class S4States(NamedTuple):
    """A pool of ``n`` slots that sequences come to and leave, and what is computed of the weights once for it."""

    h: Tensor  # complex64 [n, d_model, d_state / 2] (complex128 where the weights are float64)
    C: Tensor  # complex64 [1, d_model, d_state / 2]: the model's own C


class ConvolutionLayer(nn.Module):
    """What layers with a long filter share: the convolution of every channel, and the projection behind it::

        y   = dropout(gelu(long_conv(hidden, k, D)))
        out = glu(out_proj(y))                          or out_proj(y), without glu

    ``filters(taps)`` gives k and, where the layer is bidirectional, k_after; ``skip()`` gives D.
    """

    def __init__(self, d_model: int, l_max: int, glu: bool, dropout: float, where: dict[str, object]) -> None:
        super().__init__()
        name = type(self).__name__
        if d_model < 1 or l_max < 1:
            raise ValueError(f"{name}: d_model and l_max must be positive, got {d_model} and {l_max}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must be at least 0 and less than 1, got {dropout}")
        self.d_model, self.l_max, self.glu = d_model, l_max, glu
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model if glu else d_model, **where)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor | None = None, *, max_length: int | None = None) -> Tensor:
        """``[total, d_model]`` of packed tokens; zeros in rows after ``cu_seqlens[-1]``.

        Args:
            hidden: ``[total, d_model]``. What stands after ``cu_seqlens[-1]`` is not used.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``, on the same device; None: one sequence.
            max_length: no sequence is longer; fewer taps are quicker. ``l_max`` by default.
        """
        taps = check_rows(self, hidden, cu_seqlens, max_length)
        k, *k_after = self.filters(taps)
        y = long_conv(hidden, k, cu_seqlens, D=self.skip(), k_after=k_after[0] if k_after else None)
        return self.project(y, slack_rows(cu_seqlens, hidden.shape[0]))

    def project(self, y: Tensor, slack: Tensor | None = None) -> Tensor:
        """Behind the convolution, position by position."""
        out = self.out_proj(self.dropout(F.gelu(y)))
        if self.glu:
            out = F.glu(out, dim=-1)
        return out if slack is None else out.masked_fill(slack[:, None], 0)


class S4(ConvolutionLayer):
    """The S4 layer: for each channel a state space model that starts from HiPPO, diagonal plus low-rank.

    Tokens are packed, and no sequence sees another. The filter comes from :func:`packseq.s4_filter`, and goes through
    :func:`packseq.long_conv`; see :class:`ConvolutionLayer` for what is behind. For sequences token by token, the
    recurrence::

        states = layer.allocate_states(n)            # after training: for the weights as they are
        out    = layer.step(prompts, states, cu_seqlens)
        out    = layer.step(next_tokens, states)

    Args:
        d_model: features of a token, in and out; each is a channel.
        l_max: of the longest sequence. The layer's C belongs to filters of this length, as in the paper, where it saves
            powers of A at every step of training; :meth:`set_length` changes it, and the model stays the same.
        d_state: real numbers of a channel's state; even, at most 2048.
        init: ``"legs"``, ``"legt"`` or ``"fourier"``: the HiPPO matrix, see :mod:`packseq.nn.hippo`.
        bidirectional: a second filter, for the tokens that are yet to come; there is no recurrence then.
        glu: whether the projection has a gate.
        dropout: before the projection.
        dt_min, dt_max: between which step sizes start, evenly in their logarithm.
        device, dtype: of the projection. The state space model is float32 (float64 where dtype is), and its parameters
            are marked ``_no_weight_decay``; a smaller learning rate, such as 1e-3, does them good.

    Raises:
        ValueError: an option or an argument has the wrong shape, dtype, device or value; a sequence is longer than
            ``l_max``, where the contents of ``cu_seqlens`` are checked (elsewhere it is convolved with ``l_max`` taps).

    Source: Gu et al., arXiv 2111.00396.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        bidirectional: bool = False,
        glu: bool = True,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, l_max, glu, dropout, {"device": device, "dtype": dtype})
        self.bidirectional = bidirectional
        options = {"init": init, "dt_min": dt_min, "dt_max": dt_max, "device": device, "dtype": wide_dtype(dtype)}
        self.ssm = DplrSsm(d_model, d_state, l_max, 2 if bidirectional else 1, **options)
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "l_max", module.ssm.length))

    def filters(self, taps: int) -> Tensor:
        return self.ssm.filter(taps)

    def skip(self) -> Tensor:
        return self.ssm.skip()

    def set_length(self, l_max: int) -> None:
        """Takes sequences of up to ``l_max`` from now on; what the layer makes of shorter ones does not change."""
        self.ssm.set_length(l_max)
        self.l_max = l_max

    @torch.no_grad()
    def step(
        self, hidden: Tensor, states: S4States, cu_seqlens: Tensor | None = None, *, indices: Tensor | None = None
    ) -> Tensor:
        """The next token, or few, or a whole prompt, of many sequences; updates their states. No gradients.

        Args:
            hidden: ``[total, d_model]``, one row a sequence, or as ``cu_seqlens`` says.
            states: from :meth:`allocate_states`.
            cu_seqlens: the boundaries, int32 ``[sequences + 1]``; None: one token a sequence.
            indices: int32 ``[sequences]``: the slot of each sequence in the pool, no two the same. A negative one skips
                its sequence: no state changes, and what comes back means nothing. None: sequence ``i`` has slot ``i``.

        Returns:
            ``[total, d_model]``: :meth:`forward`'s, to rounding.
        """
        check_step(self, hidden, cu_seqlens)
        y = self.ssm.step(states.h, hidden, cu_seqlens, indices, states.C)
        return self.project(y, slack_rows(cu_seqlens, hidden.shape[0]))

    def allocate_states(self, slots: int) -> S4States:
        """A pool of zeros for :meth:`step`, where sequences start, for the weights as they are now.

        Making it takes a dense solution in float64 for each channel.
        """
        return S4States(self.ssm.allocate_states(slots), self.ssm.output_rows())


class S4D(ConvolutionLayer):
    """The S4D layer: :class:`S4` with a diagonal state matrix, whose filters have any length, and whose states can come
    in and go out of the convolution: prefill with :meth:`forward`, then :meth:`step`.

    Args:
        d_model, d_state, bidirectional, glu, dropout, dt_min, dt_max, device, dtype: as in :class:`S4`; states go in
            and out where ``d_state`` is at most 512.
        l_max: the taps of the filter where :meth:`forward` is not told ``max_length``.
        init: ``"legs"``, ``"lin"`` or ``"inv"``: the poles, see :func:`packseq.nn.hippo.diagonal`.
        discretization: ``"zoh"`` or ``"bilinear"``.

    Raises:
        ValueError: as :class:`S4`.

    Source: Gu et al., arXiv 2206.11893.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        d_state: int = 64,
        *,
        init: str = "legs",
        discretization: str = "zoh",
        bidirectional: bool = False,
        glu: bool = True,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, l_max, glu, dropout, {"device": device, "dtype": dtype})
        self.bidirectional = bidirectional
        options = {"init": init, "discretization": discretization, "dt_min": dt_min, "dt_max": dt_max}
        options |= {"device": device, "dtype": wide_dtype(dtype)}
        self.ssm = DiagonalSsm(d_model, d_state, 2 if bidirectional else 1, **options)

    def filters(self, taps: int) -> Tensor:
        return self.ssm.filter(taps)

    def skip(self) -> Tensor:
        return self.ssm.skip()

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        max_length: int | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[total, d_model]`` of packed tokens; zeros in rows after ``cu_seqlens[-1]``.

        Args:
            hidden, cu_seqlens: as in :meth:`S4.forward`.
            max_length: no sequence is longer; any number. ``l_max`` by default.
            initial_states: complex64 ``[sequences, d_model, d_state / 2]``, from which sequences go on; zeros by
                default.
            return_final_states: also return the states after the last tokens: to go on from, or to fill a pool with.
                Gradients flow through them, and through ``initial_states``.
        """
        if initial_states is None and not return_final_states:
            return super().forward(hidden, cu_seqlens, max_length=max_length)
        refuse_bidirectional(self)
        taps = check_rows(self, hidden, cu_seqlens, max_length)
        options = {"initial_states": initial_states, "return_final_states": True, "modes": self.ssm.modes()}
        y, states = long_conv(hidden, self.ssm.filter(taps)[0], cu_seqlens, D=self.skip(), **options)
        out = self.project(y, slack_rows(cu_seqlens, hidden.shape[0]))
        return (out, states) if return_final_states else out

    @torch.no_grad()
    def step(
        self, hidden: Tensor, states: Tensor, cu_seqlens: Tensor | None = None, *, indices: Tensor | None = None
    ) -> Tensor:
        """As :meth:`S4.step`; ``states``: from :meth:`allocate_states`, or the final states of a prefill."""
        check_step(self, hidden, cu_seqlens)
        y = self.ssm.step(states, hidden, cu_seqlens, indices)
        return self.project(y, slack_rows(cu_seqlens, hidden.shape[0]))

    def allocate_states(self, slots: int) -> Tensor:
        """A pool of zeros for :meth:`step`, where sequences start: complex64 ``[slots, d_model, d_state / 2]``."""
        return self.ssm.allocate_states(slots)


def check_rows(layer: nn.Module, hidden: Tensor, cu_seqlens: Tensor | None, max_length: int | None = None) -> int:
    """Raises what is wrong with a layer's arguments; how many taps its filter needs."""
    name = type(layer).__name__
    if hidden.dim() != 2 or hidden.shape[1] != layer.d_model or not hidden.is_floating_point():
        got = f"got {tuple(hidden.shape)} of {hidden.dtype}"
        raise ValueError(f"{name}: hidden must be packed, [total, {layer.d_model}], floating point, {got}")
    taps = layer.l_max if max_length is None else max_length
    if taps < 1:
        raise ValueError(f"{name}: max_length must be positive, got {taps}")
    longest = 0
    if cu_seqlens is None:
        longest = hidden.shape[0]
    else:
        check_boundaries(name, cu_seqlens, hidden.shape[0], hidden.device)
        if contents_may_be_checked(cu_seqlens) and cu_seqlens.shape[0] > 1:
            longest = int(cu_seqlens.diff().max())
    if longest > taps:
        limit = "l_max" if max_length is None else "max_length"
        raise ValueError(f"{name}: a sequence may have at most {limit} = {taps} rows, got one of {longest}")
    return taps


def check_step(layer: nn.Module, hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises what is wrong with the arguments of a step, which takes sequences of any length."""
    refuse_bidirectional(layer)
    check_rows(layer, hidden, cu_seqlens, max(1, hidden.shape[0]))


def refuse_bidirectional(layer: nn.Module) -> None:
    if layer.bidirectional:
        name = type(layer).__name__
        raise ValueError(f"{name}: a bidirectional layer has no states: its outputs wait for tokens to come")
