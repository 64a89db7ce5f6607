"""Packed layouts out of everything else: padded batches, lists, position ids, sequence numbers, jagged tensors.

:func:`pack` and :func:`unpack` are operators, the other functions are made of torch's. None of them copies anything to
the host unless it says so.
"""

import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def pack(
    padded: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    capacity: int | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a padded batch, one after another, without the padding.

    Which rows are tokens say a mask, with any pattern (padding left, right or in between), or lengths::

        tokens, cu_seqlens, indices = packseq.pack(hidden, attention_mask)
        hidden = packseq.unpack(tokens, indices, *attention_mask.shape)

    How many tokens there are is known on the device alone, so the result has as many rows as are asked for. Rows after
    the last token are slack: zeros, and -1 in ``indices``.

    Args:
        padded: ``[batch, length, ...]``, any dtype.
        mask: ``[batch, length]``, bool or integers; what is not zero is a token.
        lengths: int32 or int64 ``[batch]``: the first so many rows of each sequence are tokens. Either this or mask.
        capacity: rows of the result, on any device ``batch * length`` by default, which always suffices. ``"exact"``
            counts the tokens and copies their number to the host.

    Returns:
        ``tokens [capacity, ...]``; ``cu_seqlens``, int32 ``[batch + 1]``, the boundaries of the sequences;
        ``indices``, int64 ``[capacity]``, the place of each token among the ``batch * length`` rows. Tokens have a
        gradient, and derivatives of any order.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; on the CPU, and on a GPU with
            ``PACKSEQ_VALIDATE=1`` in the environment, also where there are more tokens than ``capacity``, or lengths
            outside ``0 .. length``. Otherwise a GPU drops the tokens that are too many, and ``cu_seqlens`` ends at the
            capacity.

    The idea of one prefix sum that serves all layers is ByteTransformer's (arXiv 2210.03052).
    """
    if isinstance(capacity, str):
        if capacity != "exact":
            raise ValueError(f'pack: capacity must be a number, "exact" or None, got {capacity!r}')
        counted = lengths if mask is None else mask.count_nonzero()
        capacity = 0 if counted is None else int(counted.sum())
    return torch.ops.packseq.pack(padded, mask, lengths, capacity)


def unpack(tokens: Tensor, places: Tensor, batch: int, length: int, *, fill: complex | bool = 0) -> Tensor:
    """A padded batch out of tokens: the inverse of :func:`pack`.

    Args:
        tokens: ``[capacity, ...]``, any dtype.
        places: where the tokens stand: the ``indices`` of :func:`pack`, int64 ``[capacity]``, which grow and end in
            any number of -1; or ``cu_seqlens``, int32 ``[batch + 1]``, which puts the padding behind each sequence.
        batch: sequences.
        length: rows of each sequence with its padding.
        fill: the value of the padding.

    Returns:
        ``[batch, length, ...]``. Differentiable in ``tokens``, with derivatives of any order.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value. What ``places`` holds is checked on the
            CPU, and on a GPU with ``PACKSEQ_VALIDATE=1``; without it tokens outside the batch are dropped.
    """
    pattern = None
    if fill != 0:
        pattern = torch.full((16 // tokens.element_size(),), fill, dtype=tokens.dtype, device=tokens.device)
    return torch.ops.packseq.unpack(tokens, places, batch, length, pattern)


# ---- what torch must know of the operators


@torch.library.register_fake("packseq::pack")
def _(padded, mask, lengths, capacity=None):
    batch, length, *row = padded.shape
    capacity = batch * length if capacity is None else capacity
    cu_seqlens = padded.new_empty(batch + 1, dtype=torch.int32)
    return padded.new_empty(capacity, *row), cu_seqlens, padded.new_empty(capacity, dtype=torch.int64)


@torch.library.register_fake("packseq::unpack")
def _(tokens, places, batch, length, fill=None):
    return tokens.new_empty(batch, length, *tokens.shape[1:])


@torch.library.register_fake("packseq::unpack_backward")
def _(dpadded, places, capacity):
    return dpadded.new_empty(capacity, *dpadded.shape[2:])


def _save_pack(ctx, inputs, output):
    _, cu_seqlens, indices = output
    ctx.mark_non_differentiable(cu_seqlens, indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices)
    ctx.shape = inputs[0].shape[:2]


def _pack_backward(ctx, dtokens, *_):
    if dtokens is None:
        return None, None, None, None
    (indices,) = ctx.saved_tensors
    return torch.ops.packseq.unpack(dtokens, indices, *ctx.shape), None, None, None


def _save_unpack(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.capacity = inputs[0].shape[0]


def _unpack_backward(ctx, dpadded):
    (places,) = ctx.saved_tensors
    return torch.ops.packseq.unpack_backward(dpadded, places, ctx.capacity), None, None, None, None


def _save_unpack_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[0].shape[:2]


def _unpack_backward_backward(ctx, ddtokens):
    (places,) = ctx.saved_tensors
    return torch.ops.packseq.unpack(ddtokens, places, *ctx.shape), None, None


torch.library.register_autograd("packseq::pack", _pack_backward, setup_context=_save_pack)
torch.library.register_autograd("packseq::unpack", _unpack_backward, setup_context=_save_unpack)
torch.library.register_autograd(
    "packseq::unpack_backward", _unpack_backward_backward, setup_context=_save_unpack_backward
)


# ---- lists and jagged tensors


def from_list(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(tokens, cu_seqlens)`` of tensors ``[length_i, ...]`` that agree in all but their length."""
    if len(sequences) == 0:
        raise ValueError("from_list: sequences must hold at least one tensor, got none")
    first = sequences[0]
    for i, x in enumerate(sequences):
        if x.dim() == 0 or (x.shape[1:], x.dtype, x.device) != (first.shape[1:], first.dtype, first.device):
            row = ", ".join(map(str, ["length", *first.shape[1:]]))
            raise ValueError(
                f"from_list: sequences must all be [{row}] {first.dtype} on {first.device} like the first, "
                f"got {list(x.shape)} {x.dtype} on {x.device} at position {i}"
            )
    boundaries = [0]
    for x in sequences:
        boundaries.append(boundaries[-1] + x.shape[0])
    return torch.cat(list(sequences)), torch.tensor(boundaries, dtype=torch.int32, device=first.device)


def to_list(tokens: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Each sequence's tokens, as views. Copies ``cu_seqlens`` to the host."""
    boundaries = cu_seqlens.tolist()
    return [tokens[begin:end] for begin, end in pairwise(boundaries)]


def from_jagged(jagged: Tensor) -> tuple[Tensor, Tensor]:
    """``(tokens, cu_seqlens)`` of a jagged nested tensor ``[batch, length_i, ...]``.

    The tokens are its values, not a copy; but where it has holes, as after ``torch.nested.narrow``, they are moved
    together, and slack follows.
    """
    if not jagged.is_nested or jagged.layout != torch.jagged:
        raise ValueError(f"from_jagged: jagged must be a nested tensor of layout torch.jagged, got {jagged.layout}")
    if getattr(jagged, "_ragged_idx", 1) != 1:
        raise ValueError(f"from_jagged: jagged must be ragged in dimension 1, got shape {list(jagged.shape)}")
    values, offsets, lengths = jagged.values(), jagged.offsets(), jagged.lengths()
    if lengths is None:
        return values, offsets.to(torch.int32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    sequence = to_seq_idx(cu_seqlens, values.shape[0]).long()
    slack = sequence < 0
    rows = (offsets[:-1] - cu_seqlens[:-1])[sequence] + torch.arange(values.shape[0], device=values.device)
    tokens = values[rows.masked_fill(slack, 0)]
    return tokens.masked_fill(slack.view(-1, *[1] * (values.dim() - 1)), 0), cu_seqlens


def to_jagged(tokens: Tensor, cu_seqlens: Tensor, *, total: int | None = None) -> Tensor:
    """A jagged nested tensor ``[sequences, length_i, ...]`` over the tokens, which are not copied.

    ``total`` is the number of tokens without slack; if it is not given, it is copied from the end of ``cu_seqlens`` to
    the host.
    """
    total = int(cu_seqlens[-1]) if total is None else total
    return torch.nested.nested_tensor_from_jagged(tokens[:total], cu_seqlens.long())


# ---- position ids and sequence numbers


def from_position_ids(position_ids: Tensor, mask: Tensor | None = None, *, max_sequences: int | None = None) -> Tensor:
    """``cu_seqlens`` from Hugging Face's position ids: a sequence ends where the next id is not one more.

    Ids may start at any number, as RoBERTa's do at 2. Padding cannot be told from them: where it repeats one id it
    comes out as sequences of one row each, and RoBERTa's, whose id is 1, joins what begins with 2 behind it. With a
    mask each stretch of padding is one sequence, and the last one is slack.

    Args:
        position_ids: integers ``[total]`` or ``[batch, length]``, whose rows are flattened and begin new sequences.
        mask: of the same shape, bool or integers; what is not zero is a token.
        max_sequences: how many sequences there is room for, by default as many as rows. The boundaries that are left
            over repeat the last one. More sequences are an error on the CPU, and on a GPU with ``PACKSEQ_VALIDATE=1``;
            else their rows become slack.

    Returns:
        int32 ``[max_sequences + 1]``.
    """
    _check_per_token("from_position_ids", "position_ids", position_ids, integer=True)
    rows = position_ids[None] if position_ids.dim() == 1 else position_ids
    restarts = torch.ones_like(rows, dtype=torch.bool)
    restarts[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
    if mask is not None:
        _check_per_token("from_position_ids", "mask", mask, like=position_ids)
        mask = mask.reshape(-1) != 0
    return _boundaries("from_position_ids", restarts.reshape(-1), rows.shape[1], mask, max_sequences)


def from_seq_idx(seq_idx: Tensor, *, max_sequences: int | None = None) -> Tensor:
    """``cu_seqlens`` from the number of each token's sequence, as Mamba's operators take them.

    A sequence ends where the number changes. Negative numbers are padding: a stretch of it is one sequence, and the
    last one is slack.

    Args:
        seq_idx: integers ``[total]`` or ``[batch, length]``, whose rows are flattened and begin new sequences.
        max_sequences: as for :func:`from_position_ids`.

    Returns:
        int32 ``[max_sequences + 1]``.
    """
    _check_per_token("from_seq_idx", "seq_idx", seq_idx, integer=True)
    rows = seq_idx[None] if seq_idx.dim() == 1 else seq_idx
    changes = torch.ones_like(rows, dtype=torch.bool)
    changes[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return _boundaries("from_seq_idx", changes.reshape(-1), rows.shape[1], rows.reshape(-1) >= 0, max_sequences)


def to_seq_idx(cu_seqlens: Tensor, total: int) -> Tensor:
    """The number of each row's sequence, int32 ``[total]``; -1 for slack."""
    rows = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True, out_int32=True) - 1
    return sequence.masked_fill(rows >= cu_seqlens[-1], -1)


def to_position_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each row's place in its sequence from 0 on, int64 ``[total]``; 0 for slack."""
    sequence = to_seq_idx(cu_seqlens, total).long()
    rows = torch.arange(total, device=cu_seqlens.device)
    return (rows - cu_seqlens[sequence]).masked_fill(sequence < 0, 0)


def _check_per_token(function: str, name: str, x: Tensor, *, integer: bool = False, like: Tensor | None = None) -> None:
    if x.is_floating_point() or x.is_complex() or (integer and x.dtype == torch.bool):
        kinds = "an integer type" if integer else "bool or an integer type"
        raise ValueError(f"{function}: {name} must be {kinds}, got {x.dtype}")
    if x.dim() not in (1, 2):
        raise ValueError(f"{function}: {name} must be [total] or [batch, length], got shape {list(x.shape)}")
    if like is not None and (x.shape, x.device) != (like.shape, like.device):
        raise ValueError(
            f"{function}: {name} must be {list(like.shape)} on {like.device}, got {list(x.shape)} on {x.device}"
        )


def _boundaries(
    function: str, starts: Tensor, length: int, is_token: Tensor | None, max_sequences: int | None
) -> Tensor:
    """From where sequences start, in rows of `length`, and which rows are not padding."""
    total = starts.shape[0]
    most = total if max_sequences is None else max_sequences
    if most < 0:
        raise ValueError(f"{function}: max_sequences must be at least 0, got {most}")
    rows = torch.arange(total, dtype=torch.int32, device=starts.device)
    # One boundary more than asked for: what is left over goes there. New boundaries are all at the end.
    cu_seqlens = torch.full((most + 2,), total, dtype=torch.int32, device=starts.device)
    if is_token is not None and total > 0:
        changes = torch.ones_like(is_token)
        changes[1:] = (is_token[1:] != is_token[:-1]) | (rows[1:] % length == 0)
        end = torch.where(is_token, rows + 1, 0).amax()
        starts = ((starts & is_token) | changes) & (rows < end)
        cu_seqlens = end.expand(most + 2).clone()
    number = starts.cumsum(0) - 1
    validates = starts.is_cpu or (starts.is_cuda and os.environ.get("PACKSEQ_VALIDATE") == "1")
    if max_sequences is not None and total > 0 and validates and not torch.compiler.is_compiling():
        found = int(number[-1]) + 1
        if found > most:
            raise ValueError(f"{function}: max_sequences must be at least the number of sequences, {found}, got {most}")
    places = number.masked_fill(~starts, most + 1).clamp(max=most + 1)
    return cu_seqlens.scatter(0, places, rows)[:-1]
