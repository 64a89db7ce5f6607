"""Every mixer over the ranks of a ring against the whole batch on one of them: how many times as fast.

torchrun --nproc-per-node 2 benchmarks/compare_ranks.py --out benchmarks/results/h200-x2
"""

import argparse
from collections.abc import Callable
from functools import partial

import packseq
import torch
import torch.distributed as dist
from packseq.filters import vandermonde_conj
from packseq.ring import ring_attention, ring_long_conv, ring_selective_scan, shard
from report import environment, write
from timing import join_ranks, time_ranks
from torch import Tensor

Inputs = tuple[list[Tensor], list[Tensor]]  # what there is a row of for each token, then the rest


def draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def attention(total: int, device: torch.device) -> Inputs:
    return [draw(device, total, 32, 128) for _ in range(3)], []


def whole_attention(rows: list[Tensor], shared: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    return packseq.attention(*rows, cu_seqlens, causal=True)


def parts_of_attention(rows: list[Tensor], shared: list[Tensor], sharding) -> Tensor:
    return ring_attention(*rows, sharding, causal=True)


def scan(total: int, device: torch.device, channels: int = 2048, states: int = 16) -> Inputs:
    rows = [draw(device, total, channels) for _ in range(2)] + [draw(device, total, 1, states) for _ in range(2)]
    return rows, [-torch.rand(channels, states, device=device) - 0.5]


def whole_scan(rows: list[Tensor], shared: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    u, delta, *BC = rows
    return packseq.selective_scan(u, delta, *shared, *BC, cu_seqlens, delta_softplus=True)


def parts_of_scan(rows: list[Tensor], shared: list[Tensor], sharding) -> Tensor:
    u, delta, *BC = rows
    return ring_selective_scan(u, delta, *shared, *BC, sharding, delta_softplus=True)


def long_conv(total: int, device: torch.device, channels: int = 768, modes: int = 16) -> Inputs:
    x = torch.complex(*(draw(device, channels, modes, dtype=torch.float32) for _ in range(2)))
    x = torch.complex(-0.01 * x.real.abs() - 0.001, x.imag)
    B, C = (draw(device, channels, modes, dtype=torch.complex64) for _ in range(2))
    return [draw(device, total, channels)], [vandermonde_conj(C * B, x, total), x, B, C]


def whole_long_conv(rows: list[Tensor], shared: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    return packseq.long_conv(*rows, shared[0], cu_seqlens)


def parts_of_long_conv(rows: list[Tensor], shared: list[Tensor], sharding) -> Tensor:
    k, *modes = shared
    return ring_long_conv(*rows, k[:, : int(sharding.lengths.max())].contiguous(), tuple(modes), sharding)


MIXERS = {
    "attention": (attention, whole_attention, parts_of_attention, "zigzag"),
    "scan": (scan, whole_scan, parts_of_scan, "contiguous"),
    "long_conv": (long_conv, whole_long_conv, parts_of_long_conv, "contiguous"),
}


def backward_of(call: Callable[[list[Tensor]], Tensor], rows: list[Tensor]) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in rows]
    out = call(leaves)
    return partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)


def compare(name: str, lengths: list[int], device: torch.device, repeats: int) -> list[dict]:
    make, whole, parts, layout = MIXERS[name]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    sharding = shard(cu_seqlens, dist.get_world_size(), layout)
    torch.manual_seed(0)
    rows, shared = make(sum(lengths), device)
    mine = [sharding.shard(x, dist.get_rank()) for x in rows]
    on_device = cu_seqlens.to(device)
    of_all = partial(whole, shared=shared, cu_seqlens=on_device)
    of_mine = partial(parts, shared=shared, sharding=sharding)
    right = sharding.shard(of_all(rows).float(), dist.get_rank())
    torch.testing.assert_close(of_mine(mine).float(), right, rtol=5e-2, atol=5e-2 * right.abs().max().item())
    calls = {
        "forward": (partial(of_all, rows), partial(of_mine, mine)),
        "backward": (backward_of(of_all, rows), backward_of(of_mine, mine)),
    }
    results = []
    for direction, (alone, together) in calls.items():
        row = {"mixer": name, "lengths": f"{len(lengths)} x {lengths[0]}", "direction": direction}
        row["alone ms"] = 1e3 * time_ranks(alone, device, repeats)  # on all at once: none has the other's bandwidth
        row["together ms"] = 1e3 * time_ranks(together, device, repeats)
        row["times as fast"] = row["alone ms"] / row["together ms"]
        results.append(row)
        if dist.get_rank() == 0:
            print(f"{name:10} {row['lengths']:10} {direction:8} {row['times as fast']:.2f} times as fast", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU for each rank")
    parser.add_argument("--tokens", type=int, help="of the whole batch (65536 on GPUs, 1024 on a CPU)")
    parser.add_argument("--repeats", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--out", help="folder for ranks_DEVICE.json and ranks_DEVICE.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    device, world = join_ranks(options.device)
    total = options.tokens or (65536 if device.type == "cuda" else 1024)
    rows = []
    for name in MIXERS:
        for count in (1, 4):
            rows += compare(name, [total // count] * count, device, options.repeats)
    if dist.get_rank() == 0:
        title = f"A ring of {world} {device.type.upper().replace('CUDA', 'GPU')}s against one of them"
        write(options.out, f"ranks_{device.type}", title, environment(options.commit), rows, [])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
