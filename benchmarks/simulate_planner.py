"""The planner's step times against those of every choice that is the same for all steps, by the cost model.

Only the planner itself runs here: on many steps of drawn lengths. The times of steps are the cost model's.

    python benchmarks/simulate_planner.py --out benchmarks/results/planner
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from packseq.ring.batches import pack_batches
from packseq.ring.cost_model import CostModel
from packseq.ring.planner import plan, static_plan

LONGEST = 256 * 1024


@dataclass(frozen=True)
class Mix:
    """Documents' lengths: log-normal, but a share of them log-uniform from 32k to 256k; none is longer."""

    median: float
    sigma: float
    tail: float

    def draw(self, documents: int, seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        body = np.exp(rng.normal(np.log(self.median), self.sigma, documents))
        tail = np.exp(rng.uniform(np.log(LONGEST / 8), np.log(LONGEST), documents))
        lengths = np.where(rng.random(documents) < self.tail, tail, body)
        return np.clip(lengths, 16, LONGEST).astype(int).tolist()


# The last three are shaped as such corpora are said to be; nothing was drawn from these.
MIXES = {
    "log-normal, 256k tail": Mix(500, 1.3, 0.002),
    "log-normal, heavier 256k tail": Mix(1000, 1.3, 0.005),
    "GitHub-like": Mix(1200, 1.7, 0.0),
    "CommonCrawl-like": Mix(800, 1.3, 0.001),
    "Wikipedia-like": Mix(500, 1.1, 0.0),
}

# (model, attention heads)
MODELS = {
    "8B": (CostModel.h200(), 32),  # Llama-3-8B: keys and values of 8 heads
    "1.3B": (CostModel.h200(parameters=1.3e9, layers=24, hidden=2048, heads=16, kv_heads=16), 16),  # GPT-3's
}


def exchanges(model: CostModel, heads: int) -> dict[str, CostModel]:
    """A ring over all ranks of a group; an all-to-all, as far as heads go, with no charge for copies of keys' heads;
    and 2-D, an all-to-all inside a node and a ring across nodes."""
    return {
        "ring": replace(model, all_to_all_ranks=1),
        "all-to-all": replace(model, all_to_all_ranks=heads),
        "2-D": replace(model, all_to_all_ranks=model.gpus_per_node),
    }


def uniform_seconds(lengths: list[int], ranks: int, size: int, model: CostModel) -> float | None:
    """A step with groups of one size, as good as it can be made: the best packing known, and unlike the planner's
    micro-steps these wait for nobody. None where memory does not hold the longest sequence."""
    room = size * model.tokens_per_rank
    if max(lengths) > room:
        return None
    distinct = np.unique(lengths)
    work = dict(zip(distinct.tolist(), np.transpose(model.work(distinct, size)), strict=True))
    slowest = 0.0
    for group in pack_batches(lengths, ranks // size, cost=lambda length: work[length].max()):
        mine = [lengths[i] for i in group]
        micro_steps = len(pack_batches(mine, capacity=int(room))) if sum(mine) > room else 1
        seconds = micro_steps * model.overhead(size) + sum((work[length] for length in mine), np.zeros(2)).max()
        slowest = max(slowest, float(seconds))
    return slowest


def uniform_choices(model: CostModel, heads: int, ranks: int) -> Iterator[tuple[str, int, CostModel]]:
    """(name, ranks of each group, model): data parallelism, and each exchange times data parallelism."""
    sizes = [2**k for k in range(ranks.bit_length()) if 2**k <= ranks]
    for name, exchange in exchanges(model, heads).items():
        least, most = {"ring": (1, ranks), "all-to-all": (2, heads), "2-D": (2 * model.gpus_per_node, ranks)}[name]
        for size in sizes:
            if least <= size <= most:
                yield "data parallel" if size == 1 else f"static {name} of {size}", size, exchange


def mixed_layouts(ranks: int) -> Iterator[list[int]]:
    """Groups of different sizes, the same for all steps: one, two or four large ones, and single ranks or pairs."""
    for large in (ranks // 2, ranks // 4, ranks // 8):
        for count in (1, 2, 4):
            for small in (1, 2):
                left = ranks - count * large
                if left > 0:
                    yield [large] * count + [small] * (left // small)


def simulate(mix: Mix, model: CostModel, heads: int, *, steps: int, documents: int, ranks: int) -> dict:
    """``seconds``: of each choice the mean of a step, or None where memory does not hold some step. ``planning``: the
    milliseconds of each plan, by the clock and of the CPU."""
    seconds: dict[str, list[float | None]] = {}
    planning: list[tuple[float, float]] = []
    for step in range(steps):
        lengths = mix.draw(documents, step)
        for row, size, exchange in uniform_choices(model, heads, ranks):
            seconds.setdefault(row, []).append(uniform_seconds(lengths, ranks, size, exchange))
        for name in ("ring", "2-D"):
            exchange = exchanges(model, heads)[name]
            for groups in mixed_layouts(ranks):
                row = (
                    f"mixed {name}: {groups.count(groups[0])} x {groups[0]}, {groups.count(groups[-1])} x {groups[-1]}"
                )
                fits = max(lengths) <= groups[0] * exchange.tokens_per_rank
                found = static_plan(lengths, groups, exchange).seconds if fits else None
                seconds.setdefault(row, []).append(found)
            begin = time.perf_counter(), time.process_time()
            found = plan(lengths, ranks, exchange)
            planning.append((1e3 * (time.perf_counter() - begin[0]), 1e3 * (time.process_time() - begin[1])))
            seconds.setdefault(f"planned {name}", []).append(found.seconds)
    means = {row: None if None in each else sum(each) / steps for row, each in seconds.items()}
    return {"seconds": means, "planning": planning}


def fastest(seconds: dict[str, float | None], *kinds: str) -> tuple[float, str]:
    """The least of the rows whose names begin with one of the kinds, and its name."""
    return min((value, row) for row, value in seconds.items() if value is not None and row.startswith(kinds))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--documents", type=int, default=512, help="sequences of a step")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--models", default=",".join(MODELS), help="some of: %(default)s")
    parser.add_argument("--cards", type=int, default=8, help="network cards of a node of 8 GPUs, 50 GB/s each")
    parser.add_argument("--rows", action="store_true", help="prints every choice, not the fastest of each kind alone")
    parser.add_argument("--out", help="folder for planner.md and planner.json")
    parser.add_argument("--commit", help="what the numbers are of, where the library does not know it")
    options = parser.parse_args(argv)

    from report import environment, write  # needs the compiled package, which nothing else here does

    rows, waits = [], []
    for model_name in options.models.split(","):
        model, heads = MODELS[model_name]
        model = replace(model, cards_per_node=options.cards)
        for mix_name, mix in MIXES.items():
            sizes = {"steps": options.steps, "documents": options.documents, "ranks": options.ranks}
            result = simulate(mix, model, heads, **sizes)
            seconds = result["seconds"]
            waits += result["planning"]
            if options.rows:
                for row, value in seconds.items():
                    shown = "memory" if value is None else f"{value:.3f} s"
                    print(f"{model_name}, {mix_name}: {row:<32} {shown}")
            ours, _ = fastest(seconds, "planned")
            ring, ring_row = fastest(seconds, "data", "static ring")
            uniform, uniform_row = fastest(seconds, "data", "static")
            mixed, mixed_row = fastest(seconds, "mixed")
            rows.append(
                {
                    "model": model_name,
                    "mix": mix_name,
                    "planned, ring (s)": seconds["planned ring"],
                    "best static ring": ring_row.removeprefix("static "),
                    "over planned ring": ring / seconds["planned ring"],
                    "planned, ring or 2-D (s)": ours,
                    "best static": uniform_row.removeprefix("static "),
                    "over planned": uniform / ours,
                    "best mixed": mixed_row.removeprefix("mixed "),
                    "mixed over planned": mixed / ours,
                }
            )
    (clock, cpu), (clock_90, cpu_90) = np.percentile(waits, [50, 90], axis=0)
    mixes = [
        f"- {name}: median {mix.median:g}, sigma {mix.sigma:g}, and {mix.tail:.1%} of the documents from 32k to 256k"
        for name, mix in MIXES.items()
    ]
    summary = [
        f"{options.ranks} ranks, {options.documents} documents a step, {options.steps} steps; "
        f"nodes of 8 GPUs with {options.cards} network cards. Seconds are means of a step; ratios say how many times "
        "as long the best choice takes that is the same for all steps. Mixed are fixed layouts of groups of two sizes.",
        "",
        "Documents are log-normal, 256k at most:",
        *mixes,
        "",
        f"Planning took {clock:.0f} ms in the median ({cpu:.0f} ms of the CPU), {clock_90:.0f} ms ({cpu_90:.0f}) at "
        "the 90th percentile.",
    ]
    title = "Planned groups against static ones, simulated with the cost model of H200s"
    write(options.out, "planner", title, environment(options.commit), rows, summary)


if __name__ == "__main__":
    main(sys.argv[1:])
