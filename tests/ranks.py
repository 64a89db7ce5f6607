"""Tests over several ranks: each a process, all on one machine, on one GPU where there are no more."""

import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

STORE_TIMEOUT = timedelta(seconds=120)
WORLDS = [1, 2, 3, 4, 8]


def _join(rank: int, size: int, port: int, device: str, timeout: timedelta) -> None:
    """The default group of so many ranks, over Gloo; its store is the parent's, which outlives lost ranks."""
    torch.set_num_threads(1)
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if gpus < size:  # NCCL takes ranks on one GPU for a mistake, unless they say that they are on different hosts
            os.environ["NCCL_HOSTID"] = f"packseq-test-{rank}"
        os.environ.update(NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        torch.cuda.set_device(rank % gpus)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=STORE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


# ---- ranks that stay


class Ranks:
    """Processes that run what they are given, each time as a group of the first so many."""

    def __init__(self, size: int, device: str):
        context, self.store = multiprocessing.get_context("spawn"), _store()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = rank, size, self.store.port, device, theirs
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def run(self, call: Callable, size: int, *arguments) -> list:
        """What ``call(group, rank, *arguments)`` returns on each; it is a function of a module."""
        for pipe in self.pipes[:size]:
            pipe.send((call, size, arguments))
        answers = [self._answer(pipe) for pipe in self.pipes[:size]]
        errors = [error for _, error in answers if error]
        assert not errors, "\n".join(errors)
        return [answer for answer, _ in answers]

    @staticmethod
    def _answer(pipe) -> tuple:
        if not pipe.poll(240):
            return None, "no answer"
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)


def _serve(rank: int, size: int, port: int, device: str, pipe) -> None:
    _join(rank, size, port, device, timedelta(seconds=120))
    groups = {n: dist.new_group(range(n), timeout=timedelta(seconds=120)) for n in range(1, size + 1)}
    while True:
        call, n, arguments = pipe.recv()
        try:
            answer = call(groups[n], rank, *arguments), None
        except Exception:
            answer = None, f"rank {rank}: {traceback.format_exc()}"
        memory = io.BytesIO()
        torch.save(answer, memory)
        pipe.send_bytes(memory.getvalue())


@cache
def ranks(device: str = "cpu") -> Ranks:
    """As long as the tests run."""
    return Ranks(8 if device == "cpu" else 4, device)


def message_of(call: Callable, *arguments, **options) -> str:
    """What a call says is wrong."""
    try:
        call(*arguments, **options)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "nothing was raised"


# ---- ranks that may be lost


def lose_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def meet(name: str, ranks: int) -> None:
    """Waits until so many ranks are here, over the store."""
    store = dist.group.WORLD.get_group_store()
    store.add(name, 1)
    while store.add(name, 0) < ranks:
        time.sleep(0.05)


def _rank(
    worker: Callable, rank: int, size: int, left: int, port: int, device: str, timeout, arguments, errors
) -> None:
    try:
        _join(rank, size, port, device, timeout)
        worker(*arguments)
        meet("end", left)  # nobody leaves while others may still receive from it
        if left == size:
            dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    os._exit(0)  # without waiting for lost ranks


def run_ranks(
    worker: Callable,
    size: int,
    *arguments,
    lost: tuple[int, ...] = (),
    seconds: float = 240,
    device: str = "cuda",
    timeout: timedelta = timedelta(minutes=30),
) -> None:
    """Runs ``worker(*arguments)`` on each rank of a default process group over Gloo, with its timeout.

    ``worker`` is a function of a module, which new processes import. All ranks must return but the lost, which must be
    killed, by :func:`lose_this_rank` or by another.
    """
    store, context = _store(), multiprocessing.get_context("spawn")
    errors, left = context.SimpleQueue(), size - len(lost)
    rest = size, left, store.port, device, timeout, arguments, errors
    processes = [context.Process(target=_rank, args=(worker, rank, *rest)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in processes) and time.monotonic() < end and errors.empty():
            time.sleep(0.05)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        told = []
        while not errors.empty():
            told.append(errors.get())
        assert not told, "\n".join(told)
        assert not hanging, f"ranks {hanging} did not end within {seconds} s"
        codes = [process.exitcode for process in processes]
        assert codes == [-signal.SIGKILL if rank in lost else 0 for rank in range(size)]
    finally:
        for process in processes:
            process.kill()
