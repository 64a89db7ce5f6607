"""ring_exchange against torch's batch_isend_irecv, one way round the ring, then the other: GB/s that a rank sends.

torchrun --nproc-per-node 2 benchmarks/compare_exchange.py --out benchmarks/results/h200-x2
"""

import argparse
from functools import partial

import torch
import torch.distributed as dist
from packseq.ring import ring_exchange
from report import environment, write
from timing import join_ranks, time_ranks
from torch import Tensor

SIZES = [1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27]  # bytes to each neighbour
TENSORS = 2  # as keys and values


def ours(tensors: list[Tensor]) -> list[Tensor]:
    return [*ring_exchange(tensors, None, 1), *ring_exchange(tensors, None, -1)]


def theirs(tensors: list[Tensor]) -> list[Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    received = []
    for shift in (1, -1):
        calls = []
        for x in tensors:
            received.append(torch.empty_like(x))
            calls.append(dist.P2POp(dist.isend, x, (rank + shift) % world))
            calls.append(dist.P2POp(dist.irecv, received[-1], (rank - shift) % world))
        for work in dist.batch_isend_irecv(calls):
            work.wait()
    return received


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU for each rank")
    parser.add_argument("--repeats", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--out", help="folder for exchange_DEVICE.json and exchange_DEVICE.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    device, world = join_ranks(options.device)
    rows = []
    for size in SIZES:
        tensors = [torch.randn(size // 4 // TENSORS, device=device) for _ in range(TENSORS)]
        for x, y in zip(ours(tensors), theirs(tensors), strict=True):
            assert torch.equal(x, y)
        names = {"packseq": ours, "batch_isend_irecv": theirs}
        seconds = {name: time_ranks(partial(call, tensors), device, options.repeats) for name, call in names.items()}
        row = {"bytes to each neighbour": size} | {f"{name} us": x * 1e6 for name, x in seconds.items()}
        row |= {"packseq GB/s": 2 * size / seconds["packseq"] * 1e-9}
        rows.append(row | {"over torch": seconds["batch_isend_irecv"] / seconds["packseq"]})
    if dist.get_rank() == 0:
        title = f"Exchanges round a ring of {world} ranks on {device.type.upper().replace('CUDA', 'GPUs')}"
        write(options.out, f"exchange_{device.type}", title, environment(options.commit), rows, [])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
