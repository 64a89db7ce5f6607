"""From packed rows to sequences and back: which sequence a row is of, its position there, one vector a sequence."""

import torch
from torch import Tensor

from ..attention import attention

_POOLING_DIM = 64  # a head that every kernel is quick with


def sequences_and_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of ``total`` packed rows the number of its sequence and its position in it, both int32 ``[total]``.

    Rows after ``cu_seqlens[-1]`` get the number of sequences, and position 0.
    """
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
    if hidden.dim() != 2:
        raise ValueError(f"mean_pool: hidden must be [total, features], got shape {tuple(hidden.shape)}")
    sequences = cu_seqlens.shape[0] - 1
    values = hidden.unflatten(1, (-1, _pooling_dim(hidden.shape[1])))
    keys = values[..., :8].detach()  # any would do, and these are in the cache already
    queries = hidden.new_zeros(sequences, keys.shape[1], keys.shape[2])
    own_row = torch.arange(sequences + 1, dtype=torch.int32, device=hidden.device)
    return attention(queries, keys, values, own_row, cu_seqlens_k=cu_seqlens).flatten(1)


def first_rows(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence (BERT's ``[CLS]``): ``[sequences, features]``, zeros for empty ones."""
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    if hidden.shape[0] == 0:  # so all are empty; known without a look at the device
        return hidden.new_zeros(empty.shape[0], hidden.shape[1])
    first = cu_seqlens[:-1].clamp(max=hidden.shape[0] - 1)  # an empty last sequence starts past the end
    return hidden[first].masked_fill(empty[:, None], 0)


def _pooling_dim(features: int) -> int:
    """How features are cut into heads: the GPU wants a multiple of 8, the CPU takes what there is."""
    dims = [d for d in range(8, _POOLING_DIM + 1, 8) if features % d == 0]
    return max(dims or [d for d in range(1, _POOLING_DIM + 1) if features % d == 0])
