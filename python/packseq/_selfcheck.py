"""Each operator, forward and backward, against a plain computation in float64: what python -m packseq runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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
        return f"{'ok' if self.ok else 'FAILED':8}{self.operator:12}{self.device:8}{dtype:10}{outcome}"


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values that the dtype holds exactly, so that rounding the inputs is no error of the operator."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def _error(ours: Tensor, right: Tensor) -> float:
    return ((ours.double().cpu() - right).abs().max() / right.abs().max()).item()


def _largest_error(operator: Function, exactly: Function, inputs: list[Tensor], device: str) -> float:
    """Of the output and of every input's gradient. `exactly` gets float64 inputs on the CPU."""
    exact = [x.double().requires_grad_() for x in inputs]
    right = exactly(*exact)
    seed = _random(*right.shape, dtype=inputs[0].dtype)
    right_grads = torch.autograd.grad(right, exact, seed.double())

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


# Operator -> its check. Every forward operator of torch.ops.packseq has one; a test counts them.
CHECKS: dict[str, Callable[[str, torch.dtype], float]] = {
    "attention": _check_attention,
    "pack": _check_pack,
    "unpack": _check_unpack,
}


def run(devices: list[str]) -> Iterator[Check]:
    """Yields a result for each operator, device and dtype; what an operator raises is its failure."""
    for operator, check in CHECKS.items():
        for device in devices:
            for dtype, limit in LIMITS.items():
                result = Check(operator, device, dtype, torch.nan, limit * torch.finfo(dtype).eps)
                try:
                    result.error = check(device, dtype)
                except Exception as error:  # reported as this check's result; the others still run
                    result.failure = f"{type(error).__name__}: {error}"
                yield result
