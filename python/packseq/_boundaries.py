"""Boundaries where the caller gives none, and which rows lie beyond them."""

import torch
from torch import Tensor

_MOST_ROWS = 2**31 - 1  # boundaries are int32


def one_sequence(name: str, x: Tensor) -> Tensor:
    return torch.arange(2, dtype=torch.int32, device=x.device) * _rows(name, x)


def one_token_each(name: str, x: Tensor) -> Tensor:
    return torch.arange(_rows(name, x) + 1, dtype=torch.int32, device=x.device)


def _rows(name: str, x: Tensor) -> int:
    total = x.shape[0] if x.dim() else 0  # a scalar is an error that the operator names
    if total > _MOST_ROWS:
        raise ValueError(f"{name} must have at most 2^31 - 1 rows where cu_seqlens is not given, got {total}")
    return total


def slack_rows(cu_seqlens: Tensor | None, total: int) -> Tensor | None:
    """Which rows are of no sequence, bool ``[total]``; None where all are of the one."""
    if cu_seqlens is None:
        return None
    return torch.arange(total, dtype=torch.int32, device=cu_seqlens.device) >= cu_seqlens[-1]
