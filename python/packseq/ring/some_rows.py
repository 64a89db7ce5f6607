"""Some of a tensor's rows, taken, put and added to: by runs where they are few, else by number."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_MOST_RUNS = 32  # of more each is short, and an index takes them all in one launch


class SomeRows:
    """Rows by their numbers, int64 on the CPU, ascending."""

    def __init__(self, rows: Tensor, device: torch.device):
        self.count = len(rows)
        ends = [*((rows.diff() != 1).nonzero()[: _MOST_RUNS + 1, 0] + 1).tolist(), self.count]
        self._runs = self._index = None
        if len(ends) > _MOST_RUNS:
            self._index = rows.to(device)
        else:
            bounds = list(pairwise([0, *ends]))
            self._sizes = [end - begin for begin, end in bounds]
            self._runs = [slice(int(rows[a]), int(rows[a]) + b - a) if b > a else slice(0, 0) for a, b in bounds]

    def of(self, x: Tensor) -> Tensor:
        """A view where they stand together."""
        if self._runs is None:
            return x.index_select(0, self._index)
        return x[self._runs[0]] if len(self._runs) == 1 else torch.cat([x[run] for run in self._runs])

    def put(self, x: Tensor, values: Tensor) -> None:
        if self._runs is None:
            x.index_copy_(0, self._index, values.to(x.dtype))
            return
        for run, part in zip(self._runs, values.split(self._sizes), strict=True):
            x[run] = part

    def add(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """To several tensors at once, to each of its own."""
        if self._runs is None:
            for x, of_x in zip(tensors, values, strict=True):
                x.index_add_(0, self._index, of_x)
        else:
            runs = [x[run] for x in tensors for run in self._runs]
            torch._foreach_add_(runs, [part for of_x in values for part in of_x.split(self._sizes)])
