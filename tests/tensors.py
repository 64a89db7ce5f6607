"""Groups of tensors by name: drawn, in float64, laid out otherwise, and what a function makes of them."""

import zlib
from collections.abc import Callable
from typing import Protocol

import torch
from operators import statistics
from torch import Tensor

Tensors = dict[str, Tensor]


class Case(Protocol):
    name: str
    dtype: torch.dtype


class Draw:
    """Random tensors that depend on the case's name alone."""

    def __init__(self, case: Case, device: str):
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
        self.device, self.wide = device, statistics(case.dtype)

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        kind = self.wide.to_complex() if dtype.is_complex else self.wide
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=kind).to(dtype)


def exact_of(tensors: Tensors) -> Tensors:
    return {name: x.to(torch.complex128 if x.is_complex() else torch.float64) for name, x in tensors.items()}


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def with_gradients(function: Callable, tensors: Tensors, gradients: Tensors) -> Tensors:
    """Outputs, which `gradients` names in order, and under "d" + name the gradients of all tensors."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = dict(zip(gradients, function(**leaves), strict=True))
    used = [name for name, x in outputs.items() if x.requires_grad]  # the reference may use nothing of an empty batch
    grads = torch.autograd.grad(
        [outputs[name] for name in used], list(leaves.values()), [gradients[name] for name in used], allow_unused=True
    )
    results = {name: x.detach() for name, x in outputs.items()}
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        results["d" + name] = torch.zeros_like(x) if grad is None else grad
    return results


# ---- the same values in other places


def apart(x: Tensor) -> Tensor:
    """The values of x [rows, ...] where rows are further apart than they are long."""
    flat = x.flatten(1)
    return torch.cat([flat.new_full((len(x), 3), torch.nan), flat, flat], 1)[:, 3 : 3 + flat.shape[1]].view_as(x)


def transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = (apart, transposed, every_other)


def laid_out(tensors: Tensors, layout: Callable[[Tensor], Tensor]) -> Tensors:
    """Each in the layout, vectors with every other value."""
    return {name: every_other(x) if x.dim() == 1 else layout(x) for name, x in tensors.items()}
