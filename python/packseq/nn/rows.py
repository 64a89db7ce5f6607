"""From packed rows to sequences and back: which sequence a row is of, its position there, one vector a sequence; and
what is checked of boundaries."""

import os

import torch
from torch import Tensor

from ..attention import attention

_POOLING_DIM = 64  # a head that every kernel is quick with


def sequences_and_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of ``total`` packed rows the number of its sequence and its position in it, both int32 ``[total]``.

    Rows after ``cu_seqlens[-1]`` get the number of sequences, and position 0.
    """
    check_boundaries("sequences_and_positions", cu_seqlens, total, cu_seqlens.device)
    rows = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    # Counting the boundaries up to a row skips empty sequences, whose boundaries repeat.
    sequences = torch.searchsorted(cu_seqlens, rows, right=True, out_int32=True) - 1
    positions = torch.where(rows < cu_seqlens[-1], rows - cu_seqlens[sequences], 0)
    return sequences, positions


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean over each sequence's rows: ``[total, features]`` to ``[sequences, features]``, zeros for empty ones.

    It is attention with one query of zeros a sequence: all scores are 0, so all values weigh the same. Thus it sums in
    float32, is differentiable and repeatable, and a sequence's mean depends on that sequence only, to the last bit.
    """
    _check_hidden("mean_pool", hidden, cu_seqlens)
    sequences = cu_seqlens.shape[0] - 1
    values = hidden.unflatten(1, (-1, _pooling_dim(hidden.shape[1])))
    keys = values[..., :8].detach()  # any would do, and these are in the cache already
    queries = hidden.new_zeros(sequences, keys.shape[1], keys.shape[2])
    own_row = torch.arange(sequences + 1, dtype=torch.int32, device=hidden.device)
    return attention(queries, keys, values, own_row, cu_seqlens_k=cu_seqlens).flatten(1)


def first_rows(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence (BERT's ``[CLS]``): ``[sequences, features]``, zeros for empty ones."""
    _check_hidden("first_rows", hidden, cu_seqlens)
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    if hidden.shape[0] == 0:  # so all are empty; known without a look at the device
        return hidden.new_zeros(empty.shape[0], hidden.shape[1])
    first = cu_seqlens[:-1].clamp(0, hidden.shape[0] - 1)  # an empty last sequence starts past the end
    return hidden[first].masked_fill(empty[:, None], 0)


def check_boundaries(what: str, cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """Raises what is wrong with ``cu_seqlens`` for ``total`` rows on ``device``."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] == 0:
        got = f"got {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise ValueError(f"{what}: cu_seqlens must be int32 [sequences + 1], {got}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{what}: cu_seqlens must be contiguous, got stride {cu_seqlens.stride(0)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{what}: cu_seqlens must be on {device} as the rows are, got {cu_seqlens.device}")
    if contents_may_be_checked(cu_seqlens):
        first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if first != 0 or last > total or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
            rule = f"start at 0, never decrease and end within the {total} rows"
            raise ValueError(f"{what}: cu_seqlens must {rule}, got {cu_seqlens.tolist()}")


def contents_may_be_checked(tensor: Tensor) -> bool:
    """It is free on the CPU; elsewhere it costs a copy to the host, so it is done on request only."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("PACKSEQ_VALIDATE", "") not in ("", "0")


def _check_hidden(what: str, hidden: Tensor, cu_seqlens: Tensor) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        got = f"got {tuple(hidden.shape)} of {hidden.dtype}"
        raise ValueError(f"{what}: hidden must be [total, features], floating point, {got}")
    check_boundaries(what, cu_seqlens, hidden.shape[0], hidden.device)


def _pooling_dim(features: int) -> int:
    """How features are cut into heads: the GPU wants a multiple of 8, the CPU takes what there is."""
    dims = [d for d in range(8, _POOLING_DIM + 1, 8) if features % d == 0]
    return max(dims or [d for d in range(1, _POOLING_DIM + 1) if features % d == 0])
