"""What tests of bad input share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """A change of an argument: into zeros, where the argument was."""
    return lambda like: torch.zeros(shape, dtype=dtype, device=like.device)


def assert_raises(call: Callable, arguments: dict, changes: dict, message: str) -> None:
    """The arguments are good until they change: to a value, or what a function makes of the argument (of the first one,
    where there is none of that name)."""
    call(**arguments)
    first = next(iter(arguments.values()))
    bad = {name: x(arguments.get(name, first)) if callable(x) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        call(**arguments | bad)


# Of two sequences in 6 rows.
bad_boundaries = pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 6], "cu_seqlens must start at 0, got 1"),
        ([0, 4, 3], "cu_seqlens must not decrease, got 4 then 3 at position 2"),
        ([0, 2, 7], "cu_seqlens must end within the 6 rows there are, got 7 at position 2"),
    ],
)
