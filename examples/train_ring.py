"""Trains a small hybrid language model, attention and Mamba layers in turn, on sequences that are spread over ranks.

    python examples/train_ring.py                                   on one process
    torchrun --nproc-per-node 2 examples/train_ring.py              each document over two; the same curve

The documents are the functions of the Python standard library, packed one after another. Every rank makes the same
batch and keeps its rows of it; what layers need of other rows goes through packseq.ring. Losses are written to the
folder, one file for each number of ranks, and drawn over each other.
"""

import argparse
import json
import math
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from packseq.ring import Sharding, ring_attention, shard
from packseq.ring.nn import Mamba
from search_report import progress
from source_code import functions
from torch import Tensor, nn
from train_mamba import Batch, Stream, pieces
from training_report import save_curves

LIMIT = 1e-5  # of the difference between two runs' losses, relative


class Attention(nn.Module):
    """Grouped heads with rotary positions, which are those in the whole document."""

    def __init__(self, d_model: int, dim: int = 32) -> None:
        super().__init__()
        self.heads, self.dim = d_model // dim, dim
        self.kv_heads = max(1, self.heads // 2)
        self.qkv = nn.Linear(d_model, (self.heads + 2 * self.kv_heads) * dim, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, hidden: Tensor, sharding: Sharding) -> Tensor:
        q, k, v = self.qkv(hidden).unflatten(1, (-1, self.dim)).split([self.heads, self.kv_heads, self.kv_heads], 1)
        positions = sharding.positions(dist.get_rank(), hidden.device)
        rates = 10000.0 ** -torch.linspace(0, 1, self.dim // 2, device=hidden.device)
        turn = torch.polar(torch.ones(()), positions[:, None, None] * rates)

        def rotate(x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x.unflatten(2, (-1, 2))) * turn).flatten(2)

        return self.out(ring_attention(rotate(q), rotate(k), v, sharding, causal=True).flatten(1))


class HybridLM(nn.Module):
    def __init__(self, d_model: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mixers = nn.ModuleList((Mamba, Attention)[i % 2](d_model) for i in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(layers + 1))

    def forward(self, ids: Tensor, sharding: Sharding) -> Tensor:
        hidden = self.embedding(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            hidden = hidden + mixer(norm(hidden), sharding)
        return self.norms[-1](hidden) @ self.embedding.weight.T


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, layout: str) -> float:
    """One step on a batch that all ranks have a part of; its loss, in bits a byte."""
    rank, total = dist.get_rank(), len(batch.ids)
    sharding = shard(batch.cu_seqlens, dist.get_world_size(), layout)
    ids, targets = sharding.shard(batch.ids, rank), sharding.shard(batch.targets, rank)
    loss = F.cross_entropy(model(ids, sharding), targets, reduction="sum") / (total * math.log(2))
    optimizer.zero_grad()
    loss.backward()
    # What each rank's rows give to the weights' gradients, and to the loss, adds up.
    shared = [loss.detach(), *(p.grad for p in model.parameters())]
    flat = torch.cat([x.reshape(-1) for x in shared])
    dist.all_reduce(flat)
    for x, y in zip(shared, flat.split([x.numel() for x in shared]), strict=True):
        x.copy_(y.view_as(x))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, default, what in (
        ("steps", 100, "of the optimizer"),
        ("batch-tokens", 2048, "at most so many in a batch"),
        ("longest", 1024, "documents are cut there"),
        ("d-model", 64, "width of the model, a multiple of 32"),
        ("layers", 4, "Mamba, attention, Mamba, ..."),
        ("seed", 0, "of weights and order"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (%(default)s)")
    parser.add_argument("--layout", choices=["zigzag", "contiguous"], default="zigzag", help="of rows (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("demo/train_ring"), help="for results (%(default)s)")
    options = parser.parse_args(arguments)
    for name, least in {"steps": 1, "longest": 2, "batch_tokens": options.longest, "layers": 1, "d_model": 32}.items():
        if getattr(options, name) < least or (name == "d_model" and options.d_model % 32):
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    return options


def join() -> None:
    """The group that torchrun made ready, or one of this process alone."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")


def report(options: argparse.Namespace, losses: list[float]) -> bool:
    """Writes this run's losses, draws those of all numbers of ranks; whether they agree."""
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = {name: str(x) for name, x in vars(options).items() if name not in ("folder", "layout")}
    file = options.folder / f"losses-{dist.get_world_size()}.json"
    file.write_text(json.dumps({"options": settings, "losses": losses}))
    runs = {}
    for path in sorted(options.folder.glob("losses-*.json")):
        run = json.loads(path.read_text())
        if run["options"] == settings:
            runs[path.stem.removeprefix("losses-")] = run["losses"]
    curves = {f"{ranks} rank{'s' if ranks != '1' else ''}": values for ranks, values in runs.items()}
    plot = options.folder / "loss.png"
    save_curves(plot, curves, "The same training over ranks", "bits a byte")
    print(f"Losses: {file}\nLoss curves: {plot}")
    worst = max(abs(x / y - 1) for run in runs.values() for x, y in zip(run, losses, strict=True))
    if len(runs) > 1:
        verdict = "at most" if worst <= LIMIT else "TOO MUCH: must be at most"
        print(f"Largest difference between the runs' losses: {worst:.1e} ({verdict} {LIMIT:.0e})")
    return worst <= LIMIT


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    join()
    first = dist.get_rank() == 0
    torch.manual_seed(options.seed)
    model = HybridLM(options.d_model, options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream = Stream(pieces(functions(), options.longest), options.batch_tokens, options.seed, torch.device("cpu"))
    losses, tokens, start = [], 0, time.perf_counter()

    def note() -> str:
        return (
            f"{losses[-1]:5.2f} bits a byte, {tokens / (time.perf_counter() - start):7,.0f} tokens/s" if tokens else ""
        )

    steps = range(options.steps)
    for _ in progress(steps, "training", options.steps, note) if first else steps:
        batch = stream.next()
        losses.append(step(model, optimizer, batch, options.layout))
        tokens += len(batch.ids)
    agree = report(options, losses) if first else True
    dist.destroy_process_group()
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
