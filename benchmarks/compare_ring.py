"""What a ring costs beside its transfers: attention in the steps of P ranks, one after another on one device, against
one call over the whole batch. The steps' sums are merged as the ring merges them, in float32, and gradients that would
return are added where the ring adds them, on a stream beside the one that computes; nothing is sent.

    python benchmarks/compare_ring.py --out benchmarks/results/h200
"""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from functools import partial

import packseq
import torch
from packseq.ring import Sharding, shard
from packseq.ring.attention_plan import Mask, Step, attention_plan
from report import environment, write
from timing import time_cpu, time_cuda
from torch import Tensor

MASK = Mask(causal=True, left=-1, right=-1, sink_tokens=0, biased=False)
accumulate = torch.ops.packseq.attention_accumulate
accumulate_backward = torch.ops.packseq.attention_accumulate_backward


class InSteps:
    """Every rank's rows and plan."""

    def __init__(self, sharding: Sharding, tensors: list[Tensor], dout: Tensor):
        device, self.sharding = dout.device, sharding
        self.ranks = [[sharding.shard(x, rank) for x in (*tensors, dout)] for rank in range(sharding.world)]
        self.plans = [attention_plan(sharding, MASK, rank, device) for rank in range(sharding.world)]
        self.options = (MASK.causal, -1, -1, 0, 0.0, None, None)

    def keys(self, rank: int, step: Step) -> list[Tensor]:
        """What the rank that has them sends."""
        source = (rank - step.shift) % self.sharding.world
        return [self.plans[source][step.shift].send.of(x) for x in self.ranks[source][1:3]]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        results = []
        for rank, (q, _, v, _) in enumerate(self.ranks):
            out = q.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float32)
            sums = q.new_zeros(*q.shape[:2], 2, dtype=torch.float32)
            sums[..., 0] = -math.inf
            for step in filter(None, self.plans[rank]):
                keys = self.keys(rank, step)
                for call in step.calls:
                    accumulate(q, *keys, out, sums, *call, *self.options)
            results.append((torch.empty(out.shape, dtype=q.dtype, device=q.device), sums.new_empty(q.shape[:2])))
            torch.ops.packseq.attention_finish(out, sums, None, *results[-1])
        return results

    def backward(self, results: list[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
        sums = [[x.new_empty(x.shape, dtype=torch.float32) for x in rank[:3]] for rank in self.ranks]
        deltas = []
        for (dq, *_), (*_, dout), (out, _) in zip(sums, self.ranks, results, strict=True):
            dq.zero_()
            deltas.append(torch.ops.packseq.attention_delta(dout, out))
        returning = None
        for shift, rank in itertools.product(range(self.sharding.world), repeat=2):
            step = self.plans[rank][shift]
            if step is None:
                continue
            (q, _, _, dout), keys = self.ranks[rank], self.keys(rank, step)
            dkeys = [torch.empty_like(x, dtype=torch.float32) for x in keys] if shift else sums[rank][1:]
            for i, call in enumerate(step.calls):
                accumulate_backward(
                    *(dout, deltas[rank], q, *keys, results[rank][1], sums[rank][0], *dkeys, i > 0),
                    *call,
                    *self.options,
                )
            if returning:
                returning.wait()
                returning = None
            if shift:
                source = (rank - shift) % self.sharding.world
                rows = self.plans[source][shift].send
                returning = Beside(dout.device, partial(rows.add, sums[source][1:], dkeys))
        if returning:
            returning.wait()
        return [[x.to(self.ranks[0][0].dtype) for x in rank] for rank in sums]


stream_of = functools.cache(partial(torch.cuda.Stream, priority=-1))  # by device


class Beside:
    """What a transfer would do with what has come, on a stream of its own until ``wait()``."""

    def __init__(self, device: torch.device, work: Callable[[], None]):
        self.work, self.done = work, None  # keeps its tensors
        if device.type == "cpu":
            return work()
        stream = stream_of(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        self.done = stream.record_event()

    def wait(self) -> None:
        if self.done:
            torch.cuda.current_stream().wait_event(self.done)


def compare(name: str, lengths: list[int], heads: int, dim: int, ranks: int, device: str, seconds: float) -> list[dict]:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    *tensors, dout = (torch.randn(sum(lengths), heads, dim, device=device, dtype=dtype) for _ in range(4))
    on_device = bounds.to(device)
    steps = InSteps(shard(bounds, ranks), tensors, dout)
    out, lse = packseq.attention(*tensors, on_device, causal=True, return_lse=True)
    results = steps.forward()
    torch.testing.assert_close(steps.sharding.unshard([x for x, _ in results]), out, rtol=2e-2, atol=2e-2)
    options = (on_device, None, True, -1, -1, 0, 0.0, None, None, None)
    calls = {
        "forward": {
            "one call": lambda: packseq.attention(*tensors, on_device, causal=True),
            "in steps": steps.forward,
        },
        "backward": {
            "one call": lambda: torch.ops.packseq.attention_backward(dout, None, *tensors, out, lse, *options),
            "in steps": lambda: steps.backward(results),
        },
    }
    rows = []
    for direction, contestants in calls.items():
        ms = (time_cuda if device == "cuda" else time_cpu)(contestants, seconds)
        row = {"case": name, "ranks": ranks, "direction": direction, "one call ms": ms["one call"]}
        rows.append(row | {"in steps ms": ms["in steps"], "ratio": ms["in steps"] / ms["one call"]})
        print(f"{name:24} {ranks:2} ranks {direction:8} {rows[-1]['ratio']:.3f} of one call's time", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--out", help="folder for ring_DEVICE.json and ring_DEVICE.md")
    parser.add_argument("--commit", help="what the report calls the commit (default: the build's)")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    total, heads = (65536, 32) if device == "cuda" else (4096, 4)
    cases = {
        f"1 x {total}": [total],
        f"4 x {total // 4}": [total // 4] * 4,
        "each half the one before": [total >> i for i in range(1, 10)],
    }
    rows = []
    for name, lengths in cases.items():
        for ranks in (2, 8):
            rows += compare(name, lengths, heads, 128, ranks, device, 0.3 if device == "cuda" else 3)
    worst = max(row["ratio"] for row in rows)
    title = "Attention in the steps of a ring, one after another, against one call"
    write(options.out, f"ring_{device}", title, environment(options.commit), rows, [f"at most {worst:.3f}"])


if __name__ == "__main__":
    main()
