"""mamba-ssm's and causal-conv1d's functions, with their signatures and layouts, on packseq's operators::

    from packseq.compat.mamba_ssm import selective_scan_fn, mamba_inner_fn, selective_state_update
    from packseq.compat.mamba_ssm import causal_conv1d_fn, causal_conv1d_update

They run on the CPU too, take any length, and give gradients to all that can have one: through last and initial states,
and through the normalisations of ``mamba_inner_fn``, where mamba-ssm has none. Batches ``(batch, dim, length)`` become
packed rows: a copy, unless their memory is channel-last, as after a linear layer; results are channel-last. Where
dtypes differ, the wider one is computed in. With documents of many lengths, :func:`packseq.selective_scan` and
:func:`packseq.causal_conv1d` need no padding.
"""

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scan import causal_conv1d, causal_conv1d_step, mamba_inner, selective_scan, selective_scan_step


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan over a batch: :func:`packseq.selective_scan` in mamba-ssm's layout.

    Args:
        u, delta, z: ``(batch, dim, length)``.
        A: ``(dim, dstate)``, real or complex.
        B, C: ``(dim, dstate)``, of A's kind; or of every token, real ``(batch, dstate, length)`` or ``(batch, groups,
            dstate, length)``. Where A is complex, these have twice the length: real and imaginary parts in turn.
        D, delta_bias: ``(dim,)``.
        seq_idx: integers ``(batch, length)``, not in mamba-ssm: where they change along a row another sequence
            starts; negative: padding, for which zeros come back.

    Returns:
        ``out (batch, dim, length)``, or ``(out, last_state)`` with ``last_state (batch, dim, dstate)``, float32 or
        complex64, and with a gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    if u.dim() != 3:
        raise ValueError(f"selective_scan_fn: u must be (batch, dim, length), got {tuple(u.shape)}")
    if seq_idx is not None and return_last_state:
        raise ValueError("selective_scan_fn: return_last_state must be False with seq_idx, which ends many sequences")
    layout = _Layout.of("selective_scan_fn", u, seq_idx)
    dtype = _widest(u, delta, z, *(matrix for matrix in (B, C) if matrix.dim() > 2))
    wide = _wide(dtype)
    out = selective_scan(
        layout.rows(u).to(dtype),
        layout.rows(delta).to(dtype),
        _parameter(A, wide),
        _matrix(B, A, layout, dtype),
        _matrix(C, A, layout, dtype),
        layout.cu_seqlens,
        D=_parameter(D, wide),
        z=None if z is None else layout.rows(z).to(dtype),
        delta_bias=_parameter(delta_bias, wide),
        delta_softplus=delta_softplus,
        return_final_states=return_last_state,
    )
    if return_last_state:
        return layout.batch_of(out[0]).to(u.dtype), out[1]
    return layout.batch_of(out).to(u.dtype)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """A Mamba block behind its first projection: convolution, projections, scan, gate and last projection.

    Args:
        xz: ``(batch, 2 * dim, length)``: what goes through convolution and scan, then the gate.
        conv1d_weight: ``(dim, 1, width)``.
        conv1d_bias, D, delta_bias: ``(dim,)``.
        x_proj_weight: ``(rank + dstate + dstate, dim)``: for the step sizes, and for B and for C where these are None.
            A complex A doubles dstate here: real and imaginary parts in turn.
        delta_proj_weight: ``(dim, rank)``.
        out_proj_weight: ``(features, dim)``; out_proj_bias: ``(features,)``.
        A: ``(dim, dstate)``, real or complex.
        B, C: None: projected from each token; or constant, ``(dim, dstate)``.
        B_proj_bias, C_proj_bias: added to the projected B and C.
        checkpoint_lvl: accepted, and without effect on results.
        b_rms_weight, c_rms_weight, dt_rms_weight: ``(dstate,)`` and ``(dim,)``, of RMS norms over the projected B and
            C, and over the projected step sizes; for a real A.
        seq_idx: as in :func:`selective_scan_fn`.

    Returns:
        ``(batch, length, features)``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    if xz.dim() != 3 or xz.shape[1] % 2:
        raise ValueError(f"mamba_inner_fn: xz must be (batch, 2 * dim, length), got {tuple(xz.shape)}")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    for name, weight in (("b_rms_weight", b_rms_weight), ("c_rms_weight", c_rms_weight)):
        if weight is not None and A.is_complex():
            raise ValueError(f"mamba_inner_fn: {name} must be None where A is complex")
    width = A.shape[1] * (2 if A.is_complex() else 1)
    parts = [delta_proj_weight.shape[1], *(width for matrix in (B, C) if matrix is None)]
    if sum(parts) != x_proj_weight.shape[0]:
        got = f"got {x_proj_weight.shape[0]}"
        raise ValueError(f"mamba_inner_fn: x_proj_weight must have {' + '.join(map(str, parts))} rows, {got}")
    layout = _Layout.of("mamba_inner_fn", xz, seq_idx)
    wide = _wide(xz.dtype)
    out_proj_bias = None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype)
    rows, A = layout.rows(xz), _parameter(A, wide)
    D, delta_bias = _parameter(D, wide), _parameter(delta_bias, wide)
    taps = _parameter(conv1d_weight[:, 0], wide), _parameter(conv1d_bias, wide)
    extras = (B, C, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight)
    if delta_softplus and not A.is_complex() and all(x is None for x in extras):
        weights = (x_proj_weight, delta_proj_weight, out_proj_weight)
        out = mamba_inner(rows, *taps, *weights, A, D, delta_bias, layout.cu_seqlens, out_proj_bias=out_proj_bias)
        return layout.batch_of(out).transpose(1, 2)
    x, z = rows.chunk(2, dim=1)
    u = causal_conv1d(x, *taps, layout.cu_seqlens, activation="silu")
    dt, *projected = F.linear(u, x_proj_weight).split(parts, dim=1)
    delta = _rms_norm(F.linear(dt, delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    B_rows, C_rows = (
        _parameter(matrix, wide)
        if matrix is not None
        else _projected(projected.pop(0), bias, norm, b_c_dt_rms_eps, A, u.dtype)
        for matrix, bias, norm in ((B, B_proj_bias, b_rms_weight), (C, C_proj_bias, c_rms_weight))
    )
    y = selective_scan(
        u,
        delta.to(u.dtype),
        A,
        B_rows,
        C_rows,
        layout.cu_seqlens,
        D=D,
        z=z.to(u.dtype),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
    )
    return layout.batch_of(F.linear(y, out_proj_weight, out_proj_bias)).transpose(1, 2)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal convolution over a batch: :func:`packseq.causal_conv1d` in causal-conv1d's layout.

    Args:
        x: ``(batch, dim, length)``, of any strides.
        weight: ``(dim, width)``, width 2 to 8.
        bias: ``(dim,)``.
        seq_idx: integers ``(batch, length)``: where they change along a row another sequence starts; negative:
            padding, for which zeros come back. Not together with states.
        initial_states: ``(batch, dim, width - 1)``, the newest last.
        return_final_states: also return the last ``width - 1`` inputs, ``(batch, dim, width - 1)``.
        final_states_out: where they are written to, besides.
        activation: None, ``"silu"`` or ``"swish"``, which are the same.

    Returns:
        ``out (batch, dim, length)``, or ``(out, final_states)``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    if x.dim() != 3:
        raise ValueError(f"causal_conv1d_fn: x must be (batch, dim, length), got {tuple(x.shape)}")
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise ValueError("causal_conv1d_fn: with seq_idx, initial_states and return_final_states must be left out")
    layout = _Layout.of("causal_conv1d_fn", x, seq_idx)
    wide = _wide(x.dtype)
    out = causal_conv1d(
        layout.rows(x),
        _parameter(weight, wide),
        _parameter(bias, wide),
        layout.cu_seqlens,
        activation=_activation("causal_conv1d_fn", activation),
        initial_states=None if initial_states is None else initial_states.to(x.dtype).contiguous(),
        return_final_states=return_final_states,
    )
    if not return_final_states:
        return layout.batch_of(out)
    out, final_states = out
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return layout.batch_of(out), final_states


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the next token, or few, of each sequence; ``conv_state`` is updated in place.

    Args:
        x: ``(batch, dim)`` or ``(batch, dim, length)``.
        conv_state: ``(slots, dim, state_len)``: at least ``width - 1`` last inputs, the newest last.
        weight: ``(dim, width)``; bias: ``(dim,)``.
        activation: None, ``"silu"`` or ``"swish"``, which are the same.
        cache_seqlens: int32 ``(batch,)``: ``conv_state`` is a ring, and the new inputs go to these places in it,
            modulo ``state_len``.
        conv_state_indices: int32 ``(batch,)``: each sequence's slot; negative: it is skipped, and zeros come back.
            None: sequence ``i`` has slot ``i``.

    Returns:
        As x is.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    width, places = weight.shape[1], conv_state.shape[-1]
    if x.dim() not in (2, 3) or conv_state.dim() != 3 or places < width - 1:
        raise ValueError(
            "causal_conv1d_update: x must be (batch, dim) or (batch, dim, length) and conv_state (slots, dim, at least "
            f"{width - 1}), got {tuple(x.shape)} and {tuple(conv_state.shape)}"
        )
    if x.numel() == 0:
        return torch.empty_like(x)
    tokens = x[:, :, None] if x.dim() == 2 else x
    layout, wide = _Layout.of("causal_conv1d_update", tokens), _wide(x.dtype)

    def step(states: Tensor, indices: Tensor | None) -> Tensor:
        out = causal_conv1d_step(
            states,
            layout.rows(tokens),
            _parameter(weight, wide),
            _parameter(bias, wide),
            layout.cu_seqlens,
            indices=indices,
            activation=_activation("causal_conv1d_update", activation),
        )
        return layout.batch_of(out)

    if cache_seqlens is None and places == width - 1 and conv_state.dtype == x.dtype and conv_state.is_contiguous():
        out = step(conv_state, conv_state_indices)
    else:
        slots = _Slots(conv_state, layout.batch, conv_state_indices)
        history = slots.read()
        window = _window(history, cache_seqlens, width - 1).to(x.dtype).contiguous()
        out = step(window, slots.indices)
        slots.write(_appended(history, cache_seqlens, tokens))
    return out[:, :, 0] if x.dim() == 2 else out


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """The scan of the next token of each sequence; ``state`` is updated in place.

    Args:
        state: ``(slots, dim, dstate)`` or ``(slots, heads, dim, dstate)``. Quickest where it is contiguous and
            float32; otherwise the slots in use are copied out and in.
        x, dt, z: ``(batch, dim)`` or ``(batch, heads, dim)``.
        A: ``(dim, dstate)`` or ``(heads, dim, dstate)``.
        B, C: ``(batch, dstate)`` or ``(batch, groups, dstate)``.
        D, dt_bias: ``(dim,)`` or ``(heads, dim)``.
        state_batch_indices: int32 ``(batch,)``: each sequence's slot; negative: it is skipped, and zeros come back.
            None: sequence ``i`` has slot ``i``.

    Returns:
        As x is.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    if state.dim() not in (3, 4) or x.shape[1:] != state.shape[1:-1] or A.shape != state.shape[1:]:
        raise ValueError(
            "selective_state_update: state must be (slots, dim, dstate) or (slots, heads, dim, dstate), x (batch, ...) "
            f"and A the same without slots, got {tuple(state.shape)}, {tuple(x.shape)} and {tuple(A.shape)}"
        )
    if x.numel() == 0:
        return torch.empty_like(x)
    batch, dstate = x.shape[0], state.shape[-1]
    dtype = _widest(x, dt, B, C, z)
    wide = _wide(dtype)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(batch, -1).to(dtype)

    def step(states: Tensor, indices: Tensor | None) -> Tensor:
        return selective_scan_step(
            states,
            rows(x),
            rows(dt),
            _parameter(A.reshape(-1, dstate), wide),
            rows(B).view(batch, -1, dstate),
            rows(C).view(batch, -1, dstate),
            indices=indices,
            D=None if D is None else _parameter(D.reshape(-1), wide),
            z=rows(z),
            delta_bias=None if dt_bias is None else _parameter(dt_bias.reshape(-1), wide),
            delta_softplus=dt_softplus,
        )

    if state.dtype == wide and state.is_contiguous():
        out = step(state.view(state.shape[0], -1, dstate), state_batch_indices)
    else:
        slots = _Slots(state, batch, state_batch_indices)
        states = slots.read().to(wide).reshape(batch, -1, dstate).contiguous()
        out = step(states, slots.indices)
        slots.write(states.view(batch, *state.shape[1:]))
    return out.view(x.shape).to(x.dtype)


# ---- layouts


@dataclass(frozen=True)
class _Layout:
    """How a batch lies in packed rows, one sequence after another."""

    batch: int
    length: int
    cu_seqlens: Tensor
    padding: Tensor | None  # bool [batch * length, 1], where there may be any

    @classmethod
    def of(cls, what: str, x: Tensor, seq_idx: Tensor | None = None) -> "_Layout":
        batch, _, length = x.shape
        if seq_idx is None:
            boundaries = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * length
            return cls(batch, length, boundaries, None)
        if seq_idx.shape != (batch, length) or seq_idx.is_floating_point() or seq_idx.device != x.device:
            got = f"got {tuple(seq_idx.shape)} of {seq_idx.dtype} on {seq_idx.device}"
            raise ValueError(f"{what}: seq_idx must be integers {(batch, length)} on {x.device}, {got}")
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        # How many sequences there are is known on the device only: so as many as there could be, the rest empty.
        rows = torch.arange(batch * length, dtype=torch.int32, device=x.device)
        boundaries = torch.where(starts.flatten(), rows, batch * length).sort().values
        boundaries = F.pad(boundaries, (0, 1), value=batch * length)
        return cls(batch, length, boundaries, (seq_idx < 0).reshape(-1, 1))

    def rows(self, x: Tensor) -> Tensor:
        """``(batch, dim, length)`` to ``[batch * length, dim]``."""
        return self.clear(x.transpose(1, 2).reshape(self.batch * self.length, x.shape[1]))

    def batch_of(self, rows: Tensor) -> Tensor:
        """The inverse, a view where nothing is padding."""
        return self.clear(rows).view(self.batch, self.length, rows.shape[1]).transpose(1, 2)

    def clear(self, rows: Tensor) -> Tensor:
        """With zeros where there is padding."""
        return rows if self.padding is None else rows.masked_fill(self.padding, 0)


class _Slots:
    """The slots of a pool that a batch uses, copied out and back where the operators cannot work in place."""

    def __init__(self, pool: Tensor, batch: int, indices: Tensor | None) -> None:
        own = torch.arange(batch, dtype=torch.int32, device=pool.device)
        indices = own if indices is None else indices
        used = (indices >= 0) & (indices < pool.shape[0])
        self.pool, self.some = pool, used.any()
        self.indices = torch.where(used, own, -1)  # among the copies
        # A sequence that is skipped repeats what the first one that is not does to its slot.
        self.source = torch.where(used, own, used.int().argmax())
        self.places = indices[self.source].long().clamp(0, pool.shape[0] - 1)

    def read(self) -> Tensor:
        return self.pool[self.places]

    def write(self, states: Tensor) -> None:
        states = states[self.source].to(self.pool.dtype)
        self.pool[self.places] = torch.where(self.some, states, self.pool[self.places])


def _window(history: Tensor, places: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs ``(batch, dim, count)``: at the end, or before ``places`` in a ring."""
    if places is None:
        return history[:, :, history.shape[2] - count :]
    return history.gather(2, _ring(history, places, torch.arange(-count, 0, device=history.device)))


def _appended(history: Tensor, places: Tensor | None, tokens: Tensor) -> Tensor:
    """With new inputs: at the end, or at ``places`` in a ring."""
    tokens = tokens.to(history.dtype)
    if places is None:
        return torch.cat([history, tokens], 2)[:, :, tokens.shape[2] :]
    first = max(0, tokens.shape[2] - history.shape[2])  # what would be overwritten at once
    new = torch.arange(first, tokens.shape[2], device=history.device)
    return history.scatter(2, _ring(history, places, new), tokens[:, :, first:])


def _ring(history: Tensor, places: Tensor, offsets: Tensor) -> Tensor:
    found = (places[:, None].long() + offsets) % history.shape[2]
    return found[:, None].expand(-1, history.shape[1], -1)


# ---- dtypes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widest(*tensors: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))


def _parameter(x: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """As the operators want their parameters, which may be complex."""
    if x is None:
        return None
    return x.to(wide.to_complex() if x.is_complex() else wide).contiguous()


def _matrix(matrix: Tensor, A: Tensor, layout: _Layout, dtype: torch.dtype) -> Tensor:
    """B or C: constant ``[channels, N]``, or of every token ``[rows, groups, N]``."""
    if matrix.dim() == 2:
        return _parameter(matrix, _wide(dtype))
    parts = 2 if A.is_complex() else 1
    if matrix.dim() not in (3, 4) or matrix.shape[-1] != parts * layout.length:
        need = f"(dim, dstate), or with {parts} * {layout.length} as the last size"
        raise ValueError(f"selective_scan_fn: B and C must be {need}, got {tuple(matrix.shape)}")
    matrix = matrix[:, None] if matrix.dim() == 3 else matrix
    _, groups, dstate, _ = matrix.shape
    tokens = matrix.unflatten(3, (layout.length, parts)).movedim(3, 1)
    rows = layout.clear(tokens.reshape(layout.batch * layout.length, groups * dstate * parts))
    return _of_groups(rows, groups, dstate, A, dtype)


def _of_groups(rows: Tensor, groups: int, dstate: int, A: Tensor, dtype: torch.dtype) -> Tensor:
    if A.is_complex():
        return torch.view_as_complex(rows.to(_wide(dtype)).view(-1, groups, dstate, 2))
    return rows.view(-1, groups, dstate).to(dtype)


def _projected(
    rows: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, A: Tensor, dtype: torch.dtype
) -> Tensor:
    """B or C of ``mamba_inner_fn``, from what was projected, ``[rows, dstate]`` or twice that."""
    rows = rows if bias is None else rows + bias.to(rows.dtype)
    return _of_groups(_rms_norm(rows, norm, eps).contiguous(), 1, A.shape[1], A, dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def _activation(what: str, activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{what}: activation must be None, "silu" or "swish", got {activation!r}')
    return None if activation is None else "silu"
