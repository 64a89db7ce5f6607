"""Our own NCCL communicator among the ranks of a process group.

:func:`communicator` gives the one of a group, :class:`Communicator` says what it does. It is not torch's: it has its
own NCCL connection and its own stream of high priority, so that its exchanges wait for none of torch's collectives, and
it raises where others hang.
"""

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .._load import _C
from .groups import Group, resolve

_of_group: "weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator]" = weakref.WeakKeyDictionary()
_made_of_group: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


def communicator(group: Group = None) -> "Communicator":
    """The communicator of a process group, by default of all ranks.

    The first call makes it, and all ranks of the group must come to it, each with its GPU current; later ones give the
    same. It ends when the group is destroyed.
    """
    group = resolve(group)
    if group not in _of_group:
        _of_group[group] = Communicator(group)
    return _of_group[group]


class Communicator:
    """Point-to-point exchanges over NCCL among the ranks of a process group, on a stream of their own.

    Every wait for other ranks ends after ``timeout``. When an exchange takes longer, or NCCL reports an error, what
    NCCL runs on the GPU is ended, and every later call on this rank raises RuntimeError with the step and its peers.
    What was received is known to be good once :meth:`Exchange.synchronize` has returned, or :meth:`check` after the GPU
    has got there, say at the end of a training step. An exchange's time counts from when the GPU could begin it.

    A CUDA graph may hold exchanges, if its ranks have exchanged once before it is captured. Its replays are not timed,
    and it must be destroyed before the communicator.

    Args:
        group: by default all ranks. All its ranks must come to the constructor. Any backend: only the group's store is
            used, which is there before NCCL works and after a rank is lost. (Where a rank hosts the store, as rank 0
            does without torchrun, the others cannot go on without that one.)
        device: the GPU, by default the current one.
        timeout: by default that of the group's store.

    Attributes:
        rank, size: this rank, and how many there are. Peers are numbered like this everywhere here.
        ranks: the global rank of each.
        device, timeout, stream: the GPU; a timedelta; the ``torch.cuda.Stream`` of the exchanges.

    Raises:
        RuntimeError: there is no GPU, no NCCL, or packseq was built without CUDA; or not all ranks came in time.
        ValueError: this rank is not in the group, or an argument is wrong.
    """

    def __init__(
        self,
        group: Group = None,
        *,
        device: torch.device | str | int | None = None,
        timeout: timedelta | None = None,
    ):
        group = resolve(group)
        if not torch.cuda.is_available():
            raise RuntimeError(f"ring: NCCL needs a GPU, and torch {torch.__version__} finds none")
        index = torch.device("cuda" if device is None else device).index
        index = torch.cuda.current_device() if index is None else index
        store = group.get_group_store()
        timeout = store.timeout if timeout is None else timeout
        ranks = tuple(dist.get_process_group_ranks(group))
        # Keeps the keys of a group's communicators apart: its ranks make them in the same order.
        _made_of_group[group] = _made_of_group.get(group, 0) + 1
        key = f"packseq/ring/{_made_of_group[group]}"
        self._hold(store, key, ranks, _join(store, key, group.rank(), len(ranks), index, timeout))

    def _hold(self, store: dist.Store, key: str, ranks: tuple[int, ...], core) -> None:
        self._store, self._key, self._core = store, key, core
        self._children = {"split": 0, "shrink": 0}
        self.ranks, self.rank, self.size = ranks, core.rank, core.size
        self.device = torch.device("cuda", core.device)
        self.timeout = timedelta(seconds=core.timeout)
        self.stream = torch.cuda.ExternalStream(core.stream, self.device)

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size} on {self.device}, global ranks {list(self.ranks)})"

    def exchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        label: str = "",
        then: Callable[[], None] | None = None,
        uses: Sequence[Tensor] = (),
    ) -> "Exchange":
        """Sends tensors to peers and receives others, as one step, behind what the current stream was given so far.

        All ranks must make their exchanges in the same order. Between two ranks sends meet receives in order, and each
        pair must agree in bytes; a rank may send to itself. Empty tensors are left out, on both sides.

        Args:
            sends, receives: ``(tensor, peer)`` pairs; contiguous tensors on this communicator's GPU, any dtype. What is
                sent must not be changed, and what is received not be used, before :meth:`Exchange.wait`.
            label: what errors call the step, beside its number.
            then: called at once, with this communicator's stream as the current one: what it launches comes behind the
                step, and :meth:`Exchange.wait` waits for it too. Its tensors that are not received are in ``uses``.
            uses: kept like those sent and received.

        Raises:
            ValueError: a tensor or a peer is wrong.
            RuntimeError: this communicator has failed.
        """
        for name, transfers in ("sends", sends), ("receives", receives):
            for tensor, _ in transfers:
                if tensor.device != self.device or not tensor.is_contiguous():
                    raise ValueError(
                        f"exchange: {name} must be contiguous tensors on {self.device}, got shape "
                        f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
                    )
        stream = torch.cuda.current_stream(self.device)
        ticket = self._core.exchange(_transfers(sends), _transfers(receives), stream.cuda_stream, label)
        exchange = Exchange(self, ticket, [*(tensor for tensor, _ in (*sends, *receives)), *uses], stream)
        if then:
            with torch.cuda.stream(self.stream):
                then()
            exchange.behind = self.stream.record_event()
        return exchange

    def check(self) -> None:
        """Raises what has gone wrong so far, if anything has. Does not wait."""
        self._core.poll()

    def abort(self) -> None:
        """Ends what NCCL runs on the GPU. Every later call raises. May be called from another thread."""
        self._core.abort()

    def split(self, color: int | None, key: int = 0) -> "Communicator | None":
        """A communicator of the ranks that give the same color, ordered by key, then rank; None where color is None.

        All ranks must call it, and this one goes on. Colors must not be negative.
        """
        if color is not None and color < 0:
            raise ValueError(f"split: color must be None or at least 0, got {color}")
        name = self._child("split")
        said = self._gather(name, range(self.size), [color, key, self.ranks[self.rank]], self.timeout)
        core = self._core.split(-1 if color is None else color, key)
        if core is None:
            return None
        order = sorted((said[rank][1], rank) for rank in said if said[rank][0] == color)
        return self._made(f"{name}/{color}", tuple(said[rank][2] for _, rank in order), core)

    def shrink(self, lost: Sequence[int] | None = None) -> "Communicator":
        """A communicator of the ranks that are left, in their old order, after some are lost. This one ends.

        All that are left must call it. NCCL's own shrink makes it where that works on all of them (NCCL 2.27 or later,
        nothing broken but the lost ranks), else the ranks join anew.

        Args:
            lost: ranks, the same on all. None finds out: whoever has not called within two timeouts is lost.

        Raises:
            RuntimeError: not all others came, or this rank came too late and counts as lost.
            ValueError: lost names no rank, this one, or one that does not exist.
        """
        name = self._child("shrink")
        patience = 2 * self.timeout  # others may need one to notice
        if lost is None:
            lost = self._absent(name, patience)
            if self.rank in lost:
                raise RuntimeError(f"ring: rank {self.rank} of {self.size} came to shrink late and counts as lost")
        elif not lost or self.rank in lost or not set(lost) <= set(range(self.size)):
            raise ValueError(
                f"shrink: lost must name ranks from 0 to {self.size - 1} without {self.rank}, got {list(lost)}"
            )
        left = [rank for rank in range(self.size) if rank not in lost]
        ranks = tuple(self.ranks[rank] for rank in left)

        can = len(left) < self.size and self._core.can_shrink()
        if all(self._gather(f"{name}/can", left, can, patience).values()):
            core = None
            with contextlib.suppress(RuntimeError):
                core = self._core.shrink(list(lost))
            if all(self._gather(f"{name}/did", left, core is not None, 2 * patience).values()):
                return self._made(name, ranks, core)
        self.abort()
        core = _join(self._store, name, left.index(self.rank), len(left), self.device.index, self.timeout)
        return self._made(name, ranks, core)

    def _child(self, kind: str) -> str:
        self._children[kind] += 1
        return f"{self._key}/{kind}{self._children[kind]}"

    def _made(self, key: str, ranks: tuple[int, ...], core) -> "Communicator":
        made = Communicator.__new__(Communicator)
        made._hold(self._store, key, ranks, core)
        return made

    def _gather(self, name: str, ranks: Sequence[int], said, patience: timedelta) -> dict:
        """What each of the ranks says, through the store."""
        self._store.set(f"{name}/{self.rank}", json.dumps(said))
        keys = [f"{name}/{rank}" for rank in ranks]
        _wait(self._store, keys, patience, f"not all of ranks {list(ranks)} came to {name.removeprefix(self._key)[1:]}")
        return {rank: json.loads(self._store.get(key)) for rank, key in zip(ranks, keys, strict=True)}

    def _absent(self, name: str, patience: timedelta) -> list[int]:
        """Who does not come. The first to give up waiting, or to see all, decides for all."""
        self._store.set(f"{name}/here/{self.rank}", "")
        end = time.monotonic() + patience.total_seconds()
        while True:
            here = [rank for rank in range(self.size) if self._store.check([f"{name}/here/{rank}"])]
            if len(here) == self.size or time.monotonic() > end or self._store.check([f"{name}/present"]):
                break
            time.sleep(0.05)
        present = json.loads(self._store.compare_set(f"{name}/present", "", json.dumps(here)))
        return [rank for rank in range(self.size) if rank not in present]


class Exchange:
    """A step under way, from :meth:`Communicator.exchange`. Keeps its tensors until :meth:`wait`."""

    def __init__(self, of: Communicator, ticket: int, tensors: list[Tensor], stream: torch.cuda.Stream):
        self.ticket = ticket
        self.behind: torch.cuda.Event | None = None  # what was to be done then is done
        self._of, self._tensors, self._stream = of, tensors, stream

    def wait(self) -> None:
        """Makes the current stream wait for the step. Does not wait on the host."""
        stream = torch.cuda.current_stream(self._of.device)
        self._of._core.wait(self.ticket, stream.cuda_stream)
        if self.behind:
            stream.wait_event(self.behind)
        if stream == self._stream:
            self._tensors = []  # whoever gets their memory on this stream comes after the step

    def synchronize(self) -> None:
        """Waits for the step on the host, and raises RuntimeError if it failed. Not for steps in a graph."""
        self._of._core.synchronize(self.ticket)
        if self.behind:
            self.behind.synchronize()
        self._tensors = []

    def __del__(self):
        for tensor in self._tensors:
            tensor.record_stream(self._of.stream)


def _join(store: dist.Store, key: str, rank: int, size: int, device: int, timeout: timedelta):
    """NCCL's bootstrap: rank 0 makes an id, and the store carries it to the others."""
    _C.Communicator.nccl()  # raises where there is none, before anyone waits
    if rank == 0:
        store.set(f"{key}/id", _C.Communicator.unique_id())
    else:
        _wait(store, [f"{key}/id"], timeout, f"rank 0 of {size} did not come to join")
    return _C.Communicator(store.get(f"{key}/id"), rank, size, device, timeout.total_seconds())


def _wait(store: dist.Store, keys: list[str], patience: timedelta, otherwise: str) -> None:
    try:
        store.wait(keys, patience)
    except RuntimeError as error:
        raise RuntimeError(f"ring: {otherwise} within {patience.total_seconds():g} s") from error


def _transfers(pairs: Sequence[tuple[Tensor, int]]) -> list[tuple[int, int, int]]:
    return [(tensor.data_ptr(), tensor.nbytes, peer) for tensor, peer in pairs]
