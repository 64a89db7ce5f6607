"""Tensors between ranks: several sends and receives at once, and the operators ring_exchange and all_to_all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .._registration import register_python_kernel
from .communicator import Exchange, communicator
from .groups import Group, group_of, name_of, resolve


def ring_exchange(
    tensors: Sequence[Tensor], group: Group = None, shift: int = 1, *, rows: Sequence[int] | None = None
) -> list[Tensor]:
    """Sends tensors to the rank ``shift`` further on, and receives those of the rank ``shift`` before.

    All move at once, on a stream of their own beside what the GPU computes. The gradient travels the other way.

    Args:
        tensors: of any shapes and dtypes; both ends of a step agree on them but for the rows.
        group: a process group, or a mesh of one dimension; None: all ranks.
        shift: 0 returns copies.
        rows: of each received tensor, where they are not those of the tensor sent.

    Returns:
        The received tensors.

    Raises:
        ValueError: an argument has a wrong value.
        RuntimeError: a rank is lost, or did not answer within the group's timeout.

    Source: Li et al., Ring Self-Attention, arXiv 2105.13120.
    """
    if rows is not None and len(rows) != len(tensors):
        raise ValueError(f"ring_exchange: rows must be one number for each of {len(tensors)} tensors, got {list(rows)}")
    return torch.ops.packseq.ring_exchange(list(tensors), name_of(group), shift, rows)


def all_to_all(
    x: Tensor, group: Group = None, *, send_rows: Sequence[int] | None = None, recv_rows: Sequence[int] | None = None
) -> Tensor:
    """Sends a run of rows to every rank, and receives one from each, put one after another by rank.

    Args:
        x: ``[rows, ...]``.
        group: as in :func:`ring_exchange`.
        send_rows, recv_rows: of each rank; None: as many for all.

    Returns:
        ``[sum(recv_rows), ...]``, differentiable.

    Raises:
        ValueError, RuntimeError: as :func:`ring_exchange`.
    """
    resolved = resolve(group)
    world = resolved.size()
    if send_rows is None and x.shape[0] % world:
        raise ValueError(f"all_to_all: x must have rows that {world} ranks divide, or send_rows, got {x.shape[0]}")
    send_rows = [x.shape[0] // world] * world if send_rows is None else list(send_rows)
    recv_rows = send_rows if recv_rows is None else list(recv_rows)
    if len(send_rows) != world or len(recv_rows) != world or sum(send_rows) != x.shape[0]:
        raise ValueError(
            f"all_to_all: send_rows and recv_rows must be {world} numbers, and x must have as many rows as are sent, "
            f"got {send_rows}, {recv_rows} and {x.shape[0]}"
        )
    return torch.ops.packseq.all_to_all(x, resolved.group_name, send_rows, recv_rows)


# ---- transfers


class Transfer:
    """Sends and receives under way; ``wait()`` once, before the received tensors are read."""

    def __init__(self, works: list[tuple[dist.Work, str]], then: Callable[[], None] | None):
        self._works, self._then = works, then

    def wait(self) -> None:
        for work, what in self._works:
            with _named(what):
                work.wait()
        if self._then:
            self._then()
        self._works, self._then = [], None


def start(
    sends: list[tuple[Tensor, int]],
    receives: list[tuple[Tensor, int]],
    group: ProcessGroup,
    step: str,
    then: Callable[[], None] | None = None,
    uses: Sequence[Tensor] = (),
) -> Transfer | Exchange:
    """Starts contiguous tensors on their way to ranks of the group, and from them into others; those without elements
    stay at home. ``step`` is what an error calls it. Both ends name each other in the same order. ``then`` does
    something with what has come, and with the tensors that it ``uses``, before ``wait()`` is over: on a GPU beside what
    that computes."""
    device = next((x.device for x, _ in (*sends, *receives)), torch.device("cpu"))
    sends, receives = ([(x, peer) for x, peer in xs if x.numel()] for xs in (sends, receives))
    if needs_communicator(device, group):
        return communicator(group).exchange(sends, receives, step, then, uses)
    rank = group.rank()
    mine = [x for x, peer in sends if peer == rank]
    for (x, _), y in zip([x for x in receives if x[1] == rank], mine, strict=True):
        x.copy_(y)
    works = []
    for xs, call, key, way in ((receives, dist.irecv, "group_src", "from"), (sends, dist.isend, "group_dst", "to")):
        for x, peer in xs:
            if peer != rank:
                what = f"{step} ({way} rank {dist.get_global_rank(group, peer)})"
                with _named(what):
                    works.append((call(x.view(-1).view(torch.uint8), group=group, **{key: peer}), what))
    return Transfer(works, then)


def needs_communicator(device: torch.device, group: ProcessGroup) -> bool:
    """Whether transfers go over one. All ranks of the group must then have come to ``communicator(group)`` before some
    of them have anything to send."""
    return device.type == "cuda" and group.size() > 1


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"ring: {what} failed on rank {dist.get_rank()}: {error}") from error


def run(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: ProcessGroup, step: str) -> None:
    start(sends, receives, group, step).wait()


def _ring_exchange(tensors, group, shift, rows):
    ranks = group_of(group)
    world, rank = ranks.size(), ranks.rank()
    rows = [x.shape[0] for x in tensors] if rows is None else rows
    received = [x.new_empty(n, *x.shape[1:]) for x, n in zip(tensors, rows, strict=True)]
    sends = [(x.contiguous(), (rank + shift) % world) for x in tensors]
    run(sends, [(x, (rank - shift) % world) for x in received], ranks, f"ring_exchange by {shift}")
    return received


def _all_to_all(x, group, send_rows, recv_rows):
    out = x.new_empty(sum(recv_rows), *x.shape[1:])
    sends, receives = x.contiguous().split(send_rows), out.split(recv_rows)
    by_rank = ([(y, peer) for peer, y in enumerate(ys)] for ys in (sends, receives))
    run(*by_rank, group_of(group), "all_to_all")
    return out


register_python_kernel("ring_exchange", _ring_exchange)
register_python_kernel("all_to_all", _all_to_all)


@torch.library.register_fake("packseq::ring_exchange")
def _(tensors, group, shift, rows):
    rows = [x.shape[0] for x in tensors] if rows is None else rows
    return [x.new_empty(n, *x.shape[1:]) for x, n in zip(tensors, rows, strict=True)]


@torch.library.register_fake("packseq::all_to_all")
def _(x, group, send_rows, recv_rows):
    return x.new_empty(sum(recv_rows), *x.shape[1:])


# ---- gradients


def _save_ring_exchange(ctx, inputs, output):
    tensors, ctx.group, ctx.shift = inputs[:3]
    ctx.rows = [x.shape[0] for x in tensors]


def _ring_exchange_backward(ctx, douts):
    return torch.ops.packseq.ring_exchange(list(douts), ctx.group, -ctx.shift, ctx.rows), None, None, None


def _save_all_to_all(ctx, inputs, output):
    _, ctx.group, ctx.send_rows, ctx.recv_rows = inputs


def _all_to_all_backward(ctx, dout):
    return torch.ops.packseq.all_to_all(dout, ctx.group, ctx.recv_rows, ctx.send_rows), None, None, None


torch.library.register_autograd("packseq::ring_exchange", _ring_exchange_backward, setup_context=_save_ring_exchange)
torch.library.register_autograd("packseq::all_to_all", _all_to_all_backward, setup_context=_save_all_to_all)
