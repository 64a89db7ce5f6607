"""Each operator, forward and backward, against a plain computation in float64: what python -m packseq runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from .ring import shard

Function = Callable[..., Tensor]
LENGTHS = [5, 0, 64, 131, 1]
# Dtype -> the error allowed, in its eps: float32 gathers rounding over a sequence, the half types round at the end.
LIMITS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}


@dataclass
class Check:
    """One operator on one device in one dtype. Errors are relative to the largest value of the right answer."""

    operator: str
    device: str
    dtype: torch.dtype
    error: float
    limit: float
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and self.error <= self.limit  # NaN is not

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        outcome = self.failure or f"error {self.error:.1e} (limit {self.limit:.1e})"
        return f"{'ok' if self.ok else 'FAILED':8}{self.operator:22}{self.device:8}{dtype:10}{outcome}"


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values that the dtype holds exactly, so that rounding the inputs is no error of the operator."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def _random_complex(*shape: int) -> Tensor:
    return torch.complex(_random(*shape, dtype=torch.float32), _random(*shape, 1, dtype=torch.float32)[..., 0])


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _error(ours: Tensor, right: Tensor) -> float:
    return ((_exact(ours).cpu() - right).abs().max() / right.abs().max()).item()


def _largest_error(operator: Function, exactly: Function, inputs: list[Tensor], device: str) -> float:
    """Of the output and of every input's gradient. `exactly` gets float64 inputs on the CPU."""
    exact = [_exact(x).requires_grad_() for x in inputs]
    right = exactly(*exact)
    real = inputs[0].dtype.to_real()
    seed = _random_complex(*right.shape) if right.is_complex() else _random(*right.shape, dtype=real)
    right_grads = torch.autograd.grad(right, exact, _exact(seed))

    ours = [x.to(device).requires_grad_() for x in inputs]
    out = operator(*ours)
    grads = torch.autograd.grad(out, ours, seed.to(device))
    return max(_error(x, y) for x, y in zip((out, *grads), (right, *right_grads), strict=True))


def _boundaries(device: str) -> Tensor:
    return torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()


def _attention_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, sequence by sequence, from the formula."""
    outs = []
    for q_i, k_i, v_i in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
        k_i, v_i = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k_i, v_i))
        scores = torch.einsum("ihd,jhd->hij", q_i, k_i) / q.shape[2] ** 0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v_i))
    return torch.cat(outs)


def _check_attention(device: str, dtype: torch.dtype) -> float:
    def operator(q, k, v):
        return torch.ops.packseq.attention(q, k, v, _boundaries(device), causal=True)[0]

    inputs = [_random(sum(LENGTHS), heads, 64, dtype=dtype) for heads in (4, 2, 2)]
    return _largest_error(operator, _attention_in_float64, inputs, device)


def _together(out: Tensor, states: Tensor) -> Tensor:
    return torch.cat([out.flatten(), states.flatten().to(out.dtype)])


def _scan_in_float64(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba's scan with a gate, token by token: outputs and final states."""
    outs, finals = [], []
    tokens = [(u * delta).split(LENGTHS), delta.split(LENGTHS), B.split(LENGTHS), C.split(LENGTHS)]
    for *sequence, h in zip(*tokens, states, strict=True):
        for ud_t, d_t, B_t, C_t in zip(*sequence, strict=True):
            h = torch.exp(d_t[:, None] * A) * h + ud_t[:, None] * B_t
            outs.append((h * C_t).sum(1))
        finals.append(h)
    return torch.stack(outs) * torch.nn.functional.silu(z), torch.stack(finals)


def _scan_inputs(dtype: torch.dtype) -> list[Tensor]:
    total, wide = sum(LENGTHS), torch.float32
    u, delta, z = (_random(total + i, 20, dtype=dtype)[:total] for i in range(3))
    B, C = (_random(total + i, 1, 8, dtype=dtype)[:total] for i in range(2))
    return [u, delta.abs(), -_random(20, 8, dtype=wide).abs(), B, C, z, _random(len(LENGTHS), 20, 8, dtype=wide)]


def _check_selective_scan(device: str, dtype: torch.dtype) -> float:
    def operator(u, delta, A, B, C, z, states):
        options = {"z": z, "initial_states": states, "return_final_states": True}
        return _together(*torch.ops.packseq.selective_scan(u, delta, A, B, C, _boundaries(device), **options))

    return _largest_error(operator, lambda *x: _together(*_scan_in_float64(*x)), _scan_inputs(dtype), device)


def _check_selective_scan_step(device: str, dtype: torch.dtype) -> float:
    inputs = _scan_inputs(dtype)
    u, delta, A, B, C, z, states = (x.to(device, copy=True) for x in inputs)
    out = torch.ops.packseq.selective_scan_step(states, u, delta, A, B, C, _boundaries(device), z=z)
    return _error(_together(out, states), _together(*_scan_in_float64(*(x.double() for x in inputs))))


def _conv1d_in_float64(x: Tensor, weight: Tensor, bias: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """With silu: outputs and final states."""
    outs, finals = [], []
    for x_i, state in zip(x.split(LENGTHS), states, strict=True):
        values = torch.cat([state.t(), x_i])
        pre = sum(weight[:, k] * values[k : k + len(x_i)] for k in range(weight.shape[1]))
        outs.append(torch.nn.functional.silu(pre + bias))
        finals.append(values[len(x_i) :].t())
    return torch.cat(outs), torch.stack(finals)


def _conv1d_inputs(dtype: torch.dtype) -> list[Tensor]:
    weight, bias = (_random(*shape, dtype=torch.float32) for shape in ((20, 4), (20,)))
    return [_random(sum(LENGTHS), 20, dtype=dtype), weight, bias, _random(len(LENGTHS), 20, 3, dtype=dtype)]


def _check_causal_conv1d(device: str, dtype: torch.dtype) -> float:
    def operator(x, weight, bias, states):
        options = {"silu": True, "return_final_states": True}
        return _together(*torch.ops.packseq.causal_conv1d(x, weight, _boundaries(device), bias, states, **options))

    return _largest_error(operator, lambda *x: _together(*_conv1d_in_float64(*x)), _conv1d_inputs(dtype), device)


def _check_causal_conv1d_step(device: str, dtype: torch.dtype) -> float:
    inputs = _conv1d_inputs(dtype)
    x, weight, bias, states = (x.to(device, copy=True) for x in inputs)
    out = torch.ops.packseq.causal_conv1d_step(states, x, weight, _boundaries(device), bias, silu=True)
    return _error(_together(out, states), _together(*_conv1d_in_float64(*(x.double() for x in inputs))))


def _check_mamba_inner(device: str, dtype: torch.dtype) -> float:
    channels, states, rank, wide = 20, 8, 3, torch.float32

    def operator(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, A):
        tensors = (xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, None, A, None, None)
        return torch.ops.packseq.mamba_inner(*tensors, _boundaries(device))[0]

    def exactly(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, A):
        x, z = xz.chunk(2, 1)
        u, _ = _conv1d_in_float64(x, conv_weight, conv_bias, x.new_zeros(len(LENGTHS), channels, 3))
        dt, B, C = (u @ x_proj.t()).split([rank, states, states], 1)
        delta = torch.nn.functional.softplus(dt @ dt_proj.t())
        none = x.new_zeros(len(LENGTHS), channels, states)
        y, _ = _scan_in_float64(u, delta, A, B[:, None], C[:, None], z, none)
        return y @ out_proj.t()

    shapes = [(sum(LENGTHS), 2 * channels), (rank + 2 * states, channels), (channels, rank), (10, channels)]
    xz, x_proj, dt_proj, out_proj = (_random(*shape, dtype=dtype) for shape in shapes)
    A = -_random(channels, states, dtype=wide).abs()
    conv_weight, conv_bias = _random(channels, 4, dtype=wide), _random(channels, dtype=wide)
    inputs = [xz, conv_weight, conv_bias, x_proj / 4, dt_proj, out_proj, A]  # a power of two: still exact
    return _largest_error(operator, exactly, inputs, device)


def _check_long_conv(device: str, dtype: torch.dtype) -> float:
    def operator(u, pre_gate, gate, k, k_after, D):
        return torch.ops.packseq.long_conv(u, k, _boundaries(device), D, pre_gate, gate, k_after)

    def exactly(u, pre_gate, gate, k, k_after, D):
        """As a product of matrices: taps at their distances, [channels, to, from]."""
        outs = []
        for x in (u * pre_gate).split(LENGTHS):
            distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
            zero = torch.zeros(20, 1, dtype=x.dtype)
            taps = torch.cat([k, zero.expand(20, 131), k_after.flip(1)], 1)  # a distance of -1 is the last one
            outs.append(torch.einsum("cts,sc->tc", taps[:, distance], x) + D * x)
        return torch.cat(outs) * gate

    rows = [_random(sum(LENGTHS) + i, 20, dtype=dtype)[i:] for i in range(3)]
    k, k_after, D = (_random(*shape, dtype=torch.float32) for shape in ((20, 131), (20, 130), (20,)))
    return _largest_error(operator, exactly, [*rows, k, k_after, D], device)


def _poles(*shape: int) -> Tensor:
    x = _random_complex(*shape)
    return torch.complex(-0.25 - x.real.abs(), x.imag)


def _check_cauchy(device: str, _: torch.dtype) -> float:
    def exactly(v, z, w):
        return (v[..., None] / (z - w[..., None])).sum(-2)

    inputs = [_random_complex(2, 3, 7), 1j * _random(40, dtype=torch.float32), _poles(3, 7)]
    plain = _largest_error(torch.ops.packseq.cauchy, exactly, inputs, device)
    pairs = _largest_error(
        lambda *x: torch.ops.packseq.cauchy(*x, True),
        lambda v, z, w: exactly(v, z, w) + exactly(v.conj(), z, w.conj()),
        *(inputs, device),
    )
    return max(plain, pairs)


def _vandermonde_in_float64(v: Tensor, x: Tensor) -> Tensor:
    return (v[..., None] * torch.exp(x[..., None] * torch.arange(40))).sum(-2)


def _check_vandermonde(device: str, _: torch.dtype) -> float:
    inputs, exactly = [_random_complex(2, 3, 7), _poles(3, 7)], _vandermonde_in_float64
    plain = _largest_error(lambda v, x: torch.ops.packseq.vandermonde(v, x, 40), exactly, inputs, device)
    pairs = _largest_error(
        lambda v, x: torch.ops.packseq.vandermonde(v, x, 40, True), lambda v, x: 2 * exactly(v, x).real, inputs, device
    )
    return max(plain, pairs)


def _check_vandermonde_transpose(device: str, _: torch.dtype) -> float:
    def exactly(u, x):
        return (u[..., None, :] * torch.exp(x[..., None] * torch.arange(40))).sum(-1)

    operator, x = torch.ops.packseq.vandermonde_transpose, _poles(3, 7)
    of_complex = _largest_error(operator, exactly, [_random_complex(2, 3, 40), x], device)
    return max(of_complex, _largest_error(operator, exactly, [_random(2, 3, 40, dtype=torch.float32), x], device))


def _s4_inputs() -> list[Tensor]:
    """w, B, C, dt and P of one column."""
    w, (B, C, P) = _poles(3, 6), (_random_complex(*shape) for shape in ((3, 6), (2, 3, 6), (1, 3, 6)))
    return [w, B, C, _random(3, dtype=torch.float32).abs() / 2, P]


def _s4_model_in_float64(w: Tensor, B: Tensor, dt: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Abar and Bbar by the bilinear transform, over both of each conjugate pair."""
    column = torch.cat([P, P.conj()], -1)[0]
    A = torch.diag_embed(torch.cat([w, w.conj()], -1)) - column[:, :, None] * column.conj()[:, None]
    half, eye = dt[:, None, None] / 2 * A, torch.eye(A.shape[-1])
    return torch.linalg.solve(eye - half, eye + half), torch.linalg.solve(
        eye - half, dt[:, None] * torch.cat([B, B.conj()], -1)
    )


def _check_s4_spectrum(device: str, _: torch.dtype) -> float:
    """The generating function of the dense model, at the roots of one."""

    def exactly(w, B, C, dt, P):
        Abar, Bbar = _s4_model_in_float64(w, B, dt, P)
        o = torch.exp(-2j * torch.pi * torch.arange(9) / 16)
        matrices = torch.eye(Abar.shape[-1]) - Abar[:, None] * o[:, None, None]
        states = torch.linalg.solve(matrices, Bbar[:, None].expand(-1, 9, -1))
        return torch.einsum("ghn,hjn->ghj", torch.cat([C, C.conj()], -1), states)

    def operator(w, B, C, dt, P):
        return torch.ops.packseq.s4_spectrum(w, B, C, dt, 16, P)

    return _largest_error(operator, exactly, _s4_inputs(), device)


def _check_s4_step(device: str, dtype: torch.dtype) -> float:
    lengths, inputs = [2, 0, 1, 5, 3], _s4_inputs()
    u, states = _random(sum(lengths), 3, dtype=dtype), _random_complex(len(lengths), 3, 6)
    Abar, Bbar = _s4_model_in_float64(*(_exact(inputs[i]) for i in (0, 1, 3, 4)))
    C, outs, finals = torch.cat([inputs[2], inputs[2].conj()], -1).to(torch.complex128), [], []
    for rows, state in zip(u.double().split(lengths), _exact(states), strict=True):
        h = torch.cat([state, state.conj()], -1)
        for x in rows:
            h = (Abar @ h[..., None])[..., 0] + Bbar * x[:, None]
            outs.append((C * h).sum(-1).real)
        finals.append(h[:, :6])

    *parameters, dt, P = (x.to(device) for x in inputs)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    pool = states.to(device, copy=True)
    out = torch.ops.packseq.s4_step(pool, u.to(device), *parameters, dt, cu_seqlens, None, P)
    return max(_error(out, torch.stack(outs)), _error(pool, torch.stack(finals)))


def _left_padding() -> Tensor:
    longest = max(LENGTHS)
    return torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]


def _check_pack(device: str, dtype: torch.dtype) -> float:
    mask = _left_padding()

    def operator(padded):
        tokens, cu_seqlens, _ = torch.ops.packseq.pack(padded, mask.to(device), None, sum(LENGTHS))
        torch.testing.assert_close(cu_seqlens, _boundaries(device))
        return tokens

    return _largest_error(operator, lambda padded: padded[mask], [_random(*mask.shape, 24, dtype=dtype)], device)


def _check_unpack(device: str, dtype: torch.dtype) -> float:
    mask = _left_padding()
    places = mask.view(-1).nonzero()[:, 0].to(device)

    def operator(tokens):
        return torch.ops.packseq.unpack(tokens, places, *mask.shape)

    def exactly(tokens):
        return tokens.new_zeros(*mask.shape, 24).masked_scatter(mask[..., None], tokens)

    return _largest_error(operator, exactly, [_random(sum(LENGTHS), 24, dtype=dtype)], device)


def _check_attention_accumulate(device: str, dtype: torch.dtype) -> float:
    """Keys in two parts: the first three of each sequence, and the others."""
    q, k, v = (_random(sum(LENGTHS), heads, 64, dtype=dtype) for heads in (4, 2, 2))
    cu_seqlens, lengths = _boundaries(device), torch.tensor(LENGTHS)
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    total = torch.zeros(q.shape, device=device)
    sums = torch.tensor([-torch.inf, 0.0], device=device).repeat(*q.shape[:2], 1)
    for rows, begin, sizes in (
        (place < 3, 0, lengths.clamp(max=3)),
        (place >= 3, 3, (lengths - 3).clamp(min=0)),
    ):
        bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int().to(device)
        positions = torch.tensor([0, begin], dtype=torch.int32, device=device).repeat(len(LENGTHS), 1)
        tensors = [q.to(device), k[rows].to(device), v[rows].to(device), total, sums, cu_seqlens, bounds, positions]
        torch.ops.packseq.attention_accumulate(*tensors, True, -1, -1, 0, 0.0, None, None)
    out, lse = torch.empty(q.shape, dtype=dtype, device=device), torch.empty(q.shape[:2], device=device)
    torch.ops.packseq.attention_finish(total, sums, None, out, lse)
    return _error(out, _attention_in_float64(*map(_exact, (q, k, v))))


def _check_attention_delta(device: str, dtype: torch.dtype) -> float:
    dout, out = (_random(sum(LENGTHS), 4, 64, dtype=dtype) for _ in range(2))
    delta = torch.ops.packseq.attention_delta(dout.to(device), out.to(device))
    return _error(delta, (_exact(dout) * _exact(out)).sum(2))


# ---- the ring, with one rank


@contextmanager
def _one_rank() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
        if alone:
            dist.destroy_process_group()


def _on_one_rank(call: Callable, exactly: Function, *heads: int) -> Callable[[str, torch.dtype], float]:
    """The check of a call with tensors of the whole batch, of so many heads each, a sharding and a group's name."""

    def check(device: str, dtype: torch.dtype) -> float:
        inputs = [_random(sum(LENGTHS), n, 64, dtype=dtype) for n in heads]
        sharding = shard(_boundaries("cpu"), 1)
        with _one_rank() as group:
            name = group.group_name
            return _largest_error(lambda *x: call(*x, sharding.key, name), exactly, inputs, device)

    return check


def _ring_attention(q: Tensor, k: Tensor, v: Tensor, key: Tensor, group: str) -> Tensor:
    return torch.ops.packseq.ring_attention(q, k, v, key, group, True, -1, -1, 0, 0.0, None, None, None)[0]


def _ring_gather(x: Tensor, key: Tensor, group: str) -> Tensor:
    return torch.ops.packseq.ring_gather(x, key, group, "all_rows", 0)[:, 0]


def _ring_exchange(x: Tensor, key: Tensor, group: str) -> Tensor:
    return torch.ops.packseq.ring_exchange([x], group, 1, None)[0]


def _all_to_all(x: Tensor, key: Tensor, group: str) -> Tensor:
    return torch.ops.packseq.all_to_all(x, group, [len(x)], [len(x)])


def _ring_pieces(x: Tensor, key: Tensor, group: str) -> Tensor:
    """The rows of x by the boundaries that came back."""
    ends = torch.ops.packseq.ring_pieces(x, key, group, False)[0].tolist()
    return torch.cat([x[a:b] for a, b in pairwise(ends)])


def _ring_sums_beyond(x: Tensor, key: Tensor, group: str) -> Tensor:
    return torch.ops.packseq.ring_sums_beyond(x, False)


# Operator -> its check. Every forward operator of torch.ops.packseq has one; a test counts them.
CHECKS: dict[str, Callable[[str, torch.dtype], float]] = {
    "attention": _check_attention,
    "attention_accumulate": _check_attention_accumulate,
    "attention_finish": _check_attention_accumulate,
    "attention_delta": _check_attention_delta,
    "selective_scan": _check_selective_scan,
    "selective_scan_step": _check_selective_scan_step,
    "mamba_inner": _check_mamba_inner,
    "causal_conv1d": _check_causal_conv1d,
    "causal_conv1d_step": _check_causal_conv1d_step,
    "long_conv": _check_long_conv,
    "s4_step": _check_s4_step,
    "cauchy": _check_cauchy,
    "vandermonde": _check_vandermonde,
    "vandermonde_transpose": _check_vandermonde_transpose,
    "s4_spectrum": _check_s4_spectrum,
    "pack": _check_pack,
    "unpack": _check_unpack,
    "ring_attention": _on_one_rank(_ring_attention, _attention_in_float64, 4, 2, 2),
    "ring_gather": _on_one_rank(_ring_gather, torch.clone, 2),
    "ring_exchange": _on_one_rank(_ring_exchange, torch.clone, 2),
    "all_to_all": _on_one_rank(_all_to_all, torch.clone, 2),
    "ring_pieces": _on_one_rank(_ring_pieces, torch.clone, 2),
    "ring_sums_beyond": _on_one_rank(_ring_sums_beyond, lambda x: x.flip(1).cumsum(1).flip(1) - x, 3),
}
# What takes complex numbers alone, of float32's precision.
FILTERS = {"cauchy", "vandermonde", "vandermonde_transpose", "s4_spectrum"}


def run(devices: list[str]) -> Iterator[Check]:
    """Yields a result for each operator, device and dtype; what an operator raises is its failure."""
    for operator, check in CHECKS.items():
        for device in devices:
            for dtype, limit in LIMITS.items():
                if operator in FILTERS and dtype != torch.float32:
                    continue
                result = Check(operator, device, dtype, torch.nan, limit * torch.finfo(dtype).eps)
                try:
                    result.error = check(device, dtype)
                except Exception as error:  # reported as this check's result; the others still run
                    result.failure = f"{type(error).__name__}: {error}"
                yield result
