"""What the operators' registrations share: gradients, their absence, autocast, and parameters in half types."""

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("packseq", "IMPL")  # registrations last as long as it does


def register_python_kernel(operator: str, kernel: Callable) -> None:
    """Of an operator that is made of others."""
    for key in ("CPU", "CUDA"):
        _library.impl(operator, kernel, key)


# ---- gradients


def register_gradient(operator: str, backward: Callable, save: Callable) -> None:
    """The backward is an operator of its own, which cannot be differentiated again."""

    def second(ctx, *grads):
        raise NotImplementedError(
            f"{operator}: second derivatives are not implemented (its backward was differentiated)"
        )

    torch.library.register_autograd(f"packseq::{operator}", backward, setup_context=save)
    torch.library.register_autograd(f"packseq::{operator}_backward", second)


def empty_gradient(x: Tensor | None, like: Tensor) -> Tensor:
    """Of an optional argument: without elements, in the dtype of `like`, where there is none."""
    return like.new_empty(0) if x is None else x.new_empty(x.shape)


def register_without_gradient(operator: str) -> None:
    """An operator that updates arguments in place (torch.library.register_autograd takes none such)."""
    call = getattr(torch.ops.packseq, operator).default
    names = [argument.name for argument in call._schema.arguments]
    updated = [i for i, x in enumerate(call._schema.arguments) if x.alias_info is not None and x.alias_info.is_write]

    def kernel(*args):
        if torch.is_grad_enabled():
            for name, x in zip(names, args, strict=False):  # trailing defaults are left out
                if isinstance(x, Tensor) and x.requires_grad:
                    raise NotImplementedError(
                        f"{operator}: there is no gradient, {name} must not require one: detach() it, or call within "
                        "torch.no_grad()"
                    )
        torch.autograd.graph.increment_version([args[i] for i in updated])
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    _library.impl(operator, kernel, "Autograd")


# ---- autocast

Cast = Callable[[Tensor | None], Tensor | None]


def register_autocast(operator: str, arguments: Callable[..., tuple]) -> None:
    """Under autocast the operator gets what ``arguments(cast, *args)`` makes of its own: ``cast(x)`` is x in autocast's
    dtype (float64, integers, complex numbers and None stay). torch.library.register_autocast would cast all tensors."""
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(operator, _kernel(operator, arguments, device, key), key)


def _kernel(operator: str, arguments: Callable[..., tuple], device: str, key: str) -> Callable:
    autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    call = getattr(torch.ops.packseq, operator)

    def cast(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(device))

    def kernel(*args):
        args = arguments(cast, *args)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return call(*args)

    return kernel


def wide_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Of parameters and states beside tensors of this dtype (None: torch's default), as operators take them."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def widened(x: Tensor | None) -> Tensor | None:
    """A parameter that operators take in float32 only."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x
