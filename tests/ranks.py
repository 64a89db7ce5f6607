"""Tests over several ranks: each a process, all on one machine, on one GPU where there are no more."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

STORE_TIMEOUT = timedelta(seconds=120)


def lose_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def meet(name: str, ranks: int) -> None:
    """Waits until so many ranks are here, over the store, which outlives lost ranks."""
    store = dist.group.WORLD.get_group_store()
    store.add(name, 1)
    while store.add(name, 0) < ranks:
        time.sleep(0.05)


def _rank(worker: Callable, rank: int, size: int, left: int, port: int, arguments: tuple, errors) -> None:
    try:
        gpus = torch.cuda.device_count()
        if gpus < size:  # NCCL takes ranks on one GPU for a mistake, unless they say that they are on different hosts
            os.environ["NCCL_HOSTID"] = f"packseq-test-{rank}"
        os.environ.update(NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        torch.cuda.set_device(rank % gpus)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=STORE_TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        worker(*arguments)
        meet("end", left)  # nobody leaves while others may still receive from it
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise


def run_ranks(worker: Callable, size: int, *arguments, lost: tuple[int, ...] = (), seconds: float = 240) -> None:
    """Runs ``worker(*arguments)`` on each rank of a default process group over gloo, whose store is this process.

    ``worker`` is a function of a module, which new processes import. All ranks must return but the lost, which must be
    killed by :func:`lose_this_rank`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    left = size - len(lost)
    processes = [
        context.Process(target=_rank, args=(worker, rank, size, left, store.port, arguments, errors))
        for rank in range(size)
    ]
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
