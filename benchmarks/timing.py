"""Times contestants that take turns, so a drifting clock or a busy neighbour meets all of them alike."""

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

_FLUSH_BYTES = 256 << 20  # more than any GPU's L2


def time_cuda(contestants: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, float]:
    """Median milliseconds a call, by CUDA events, with a cold L2.

    Each contestant gets about `seconds` of GPU time. The flush before every call keeps the GPU busy while the host
    launches, so the host's own time stays out as long as it is shorter than the flush and the call together.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def rounds(count: int) -> dict[str, float]:
        events = {name: [] for name in contestants}
        for _ in range(count):
            for name, call in contestants.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                begin.record()
                call()
                end.record()
                events[name].append((begin, end))
        torch.cuda.synchronize()
        return {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in events.items()}

    rounds(2)
    guess = rounds(3)
    return rounds(max(least, min(500, int(seconds * 1e3 / (statistics.mean(guess.values()) + 0.1)))))


def time_cpu(contestants: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, float]:
    """Median milliseconds a call by the wall clock; each contestant gets about `seconds`."""
    times = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    deadline = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < least:
        for name, call in contestants.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def join_ranks(device: str | None) -> tuple[torch.device, int]:
    """This rank's device, by default a GPU where there is one for each, and how many ranks torchrun has started."""
    local, on_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    where = torch.device("cuda", local) if (device or ("cpu", "cuda")[on_gpus]) == "cuda" else torch.device("cpu")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return where, dist.get_world_size()


def time_ranks(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds by the wall clock from when all ranks begin to when the slowest is done; the median over repeats."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = []
    for _ in range(repeats + 2):
        dist.barrier()
        wait()
        begin = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - begin)
    slowest = torch.tensor(taken[2:], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())
