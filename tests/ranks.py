"""Ranks to test with: processes that stay, and run what they are given, each with a process group of so many."""

import io
import os
import socket
import traceback
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 8
WORLDS = [1, 2, 3, 4, 8]
TIMEOUT = timedelta(seconds=60)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_rank(rank: int, world: int, port: int, device: str) -> None:
    """Joins the default group; several ranks share a GPU where there is one."""
    torch.set_num_threads(1)
    if device == "cuda":  # NCCL takes ranks with one GPU for a mistake unless their hosts differ
        os.environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def _serve(rank: int, world: int, port: int, device: str, pipe) -> None:
    start_rank(rank, world, port, device)
    groups = {n: dist.new_group(range(n), timeout=TIMEOUT) for n in range(1, world + 1)}
    while (work := pipe.recv()) is not None:
        call, n, args = work
        try:
            answer = call(groups[n], rank, *args), None
        except Exception as error:
            answer = None, (f"rank {rank}: {error}", traceback.format_exc())
        memory = io.BytesIO()
        torch.save(answer, memory)
        pipe.send_bytes(memory.getvalue())


class Ranks:
    def __init__(self, world: int, device: str):
        context, port = mp.get_context("spawn"), free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, device, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, call, world: int, *args) -> list:
        """What ``call(group, rank, *args)`` returns on each rank of a group of so many."""
        for pipe in self.pipes[:world]:
            pipe.send((call, world, args))
        answers = [self._answer(pipe) for pipe in self.pipes[:world]]
        errors = [error for _, error in answers if error]
        assert not errors, "\n".join(f"{message}\n{trace}" for message, trace in errors)
        return [answer for answer, _ in answers]

    @staticmethod
    def _answer(pipe) -> tuple:
        if not pipe.poll(120):
            return None, ("no answer", "")
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)


@cache
def ranks(device: str = "cpu") -> Ranks:
    return Ranks(MOST if device == "cpu" else 4, device)
