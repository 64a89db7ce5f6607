"""Mamba's scan and convolution from their formulas, sequence by sequence, in plain torch: exact in float64, and as
torch would do it in any dtype, whose error is the measure of ours. Their gradients are autograd's.

Parameters may have a copy for every row, as [total, ...]: their gradients are the terms of the shared ones' sums.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def wide(x: Tensor | None) -> Tensor | None:
    """Half types are computed in float32, and rounded once."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def sequences_of(lengths) -> Iterator[tuple[int, slice]]:
    begin = 0
    for i, n in enumerate(lengths):
        yield i, slice(begin, begin + n)
        begin += n


def of_rows(parameter: Tensor, dims: int, rows: slice) -> Tensor:
    return parameter if parameter.dim() == dims else parameter[rows]


LONG = 4096  # from here on token by token would take too long


def scan_of_one(decay: Tensor, pushed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h[t] = decay[t] h[t - 1] + pushed[t], all [length, channels, states]: every h, and the last."""
    if len(decay) > LONG:
        return scan_by_doubling(decay, pushed, state)
    states = []
    for a, b in zip(decay.unbind(), pushed.unbind(), strict=True):
        state = torch.addcmul(b, a, state)
        states.append(state)
    return torch.stack(states), state


def scan_by_doubling(decay: Tensor, pushed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each pass adds up twice as many tokens."""
    h = torch.cat([(decay[:1] * state + pushed[:1]), pushed[1:]])
    step = 1
    while step < len(h):
        h = torch.cat([h[:step], decay[step:] * h[:-step] + h[step:]])
        decay = torch.cat([decay[:step], decay[step:] * decay[:-step]])
        step *= 2
    return h, h[-1]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    lengths,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_states: Tensor | None = None,
    reverse: bool = False,
    decay_error: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed: the sequences one after another, then slack rows, which come back as zeros. Out and final states.

    decay_error: gives the relative error of every decay, to see what it does.
    """
    channels, states = A.shape[-2:]
    dtype = u.dtype
    u, delta, z, B, C = (wide(x) for x in (u, delta, z, B, C))

    def rows_of(matrix: Tensor, rows: slice) -> Tensor:
        """[length, channels, states], of a matrix of every token or a constant one."""
        if matrix.dim() == 2:
            return matrix
        return matrix[rows].repeat_interleave(channels // matrix.shape[1], 1)

    outs, finals = [], []
    for i, rows in sequences_of(lengths):
        state = A.new_zeros(channels, states) if initial_states is None else initial_states[i]
        if rows.start == rows.stop:
            outs.append(u[rows].to(dtype))
            finals.append(state)
            continue
        d = delta[rows] if delta_bias is None else delta[rows] + of_rows(delta_bias, 1, rows)
        d = softplus(d) if delta_softplus else d
        decay = torch.exp(d[..., None] * of_rows(A, 2, rows))
        decay = decay if decay_error is None else decay * (1 + decay_error(decay.detach()))
        pushed = (d * u[rows])[..., None] * rows_of(B, rows)
        if reverse:
            decay, pushed = decay.flip(0), pushed.flip(0)
        h, state = scan_of_one(decay, pushed.to(decay.dtype), state)
        h = h.flip(0) if reverse else h
        y = (rows_of(C, rows) * h).sum(2)
        y = 2 * y.real if y.is_complex() else y
        y = y if D is None else y + of_rows(D, 1, rows) * u[rows]
        y = y if z is None else y * silu(z[rows])
        outs.append(y.to(dtype))
        finals.append(state)
    outs.append(torch.zeros(len(u) - sum(lengths), channels, dtype=dtype, device=u.device))
    finals.append(A.new_zeros(0, channels, states))  # torch.stack takes no empty list
    return torch.cat(outs), torch.cat([x.view(-1, channels, states) for x in finals])


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same for the convolution: out and final states."""
    channels, width = weight.shape[-2:]
    dtype = x.dtype
    x, initial_states = wide(x), wide(initial_states)
    outs, finals = [], []
    for i, rows in sequences_of(lengths):
        before = x.new_zeros(channels, width - 1) if initial_states is None else initial_states[i]
        length = rows.stop - rows.start
        values = torch.cat([before.t(), x[rows].flip(0) if reverse else x[rows]])
        taps = [values[k : k + length] for k in range(width)]
        taps = [tap.flip(0) for tap in taps] if reverse else taps
        out = sum(of_rows(weight, 2, rows)[..., k] * taps[k] for k in range(width))
        out = out if bias is None else out + of_rows(bias, 1, rows)
        outs.append((silu(out) if activation == "silu" else out).to(dtype))
        finals.append(values[length:].t().to(dtype))
    outs.append(torch.zeros(len(x) - sum(lengths), channels, dtype=dtype, device=x.device))
    finals.append(torch.zeros(0, channels, width - 1, dtype=dtype, device=x.device))
    return torch.cat(outs), torch.cat([f.reshape(-1, channels, width - 1) for f in finals])
