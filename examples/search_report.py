"""How the demo shows things: progress, text bars, tables and the plot."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")
EDGES = [0, 8, 16, 32, 64, 128, 256, 512]
INK, GREY, COLOUR = "#22303c", "#a9b4bd", "#0b7285"


@dataclass
class Bar:
    """One way of encoding, in the plot."""

    label: str
    speed: float  # real tokens a second
    ratio: float  # to padded batches as they come, in the same dtype
    packed: bool


def progress(items: Iterable[T], label: str, total: int, note: Callable[[], str] = str) -> Iterator[T]:
    """Yields the items, with a bar on a terminal and a line every ten seconds elsewhere; the note stands at its end."""
    terminal, start, shown = sys.stderr.isatty(), time.monotonic(), time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if terminal and (now - shown > 0.1 or done == 0):
            bar = "█" * (30 * done // total)
            print(f"\r  {label:24} {bar:░<30} {done}/{total} {note()}", end="", file=sys.stderr, flush=True)
            shown = now
        elif not terminal and now - shown > 10:
            print(f"  {label}: {done}/{total}, {now - start:.0f} s {note()}", file=sys.stderr, flush=True)
            shown = now
        yield item
    if terminal:
        print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)


def print_histogram(lengths: list[int]) -> None:
    """A bar of texts for each range of lengths, and the share of all tokens that they hold."""
    tokens = np.asarray(lengths)
    ranges = [(low + 1, high, tokens[(tokens > low) & (tokens <= high)]) for low, high in pairwise(EDGES)]
    most = max(len(inside) for _, _, inside in ranges)
    for low, high, inside in ranges:
        bar = "█" * round(40 * len(inside) / most)
        share = inside.sum() / tokens.sum()
        print(f"  {low:>4} to {high:<4} {bar:40} {len(inside):>6,} texts, {share:4.0%} of the tokens")


def print_padding(lengths: list[int], batch_size: int) -> None:
    """How many rows padded batches have for each real token."""
    total = sum(lengths)
    for label, order in (("as they come", lengths), ("sorted by length", sorted(lengths))):
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rows = sum(max(b) * len(b) for b in batches)
        print(f"  padded, {label:18} {rows:>11,} rows, {1 - total / rows:5.1%} of them padding")
    print(f"  packed {'':19} {total:>11,} rows, none of them padding")


def save_plot(path: Path, lengths: list[int], bars: list[Bar], where: str) -> None:
    """Two panels: the lengths of the texts, and the speed of each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=[1, 1.15], layout="constrained")

    left.hist(lengths, bins=np.geomspace(2.5, 513, 41), color=COLOUR, edgecolor="white", linewidth=0.4)
    left.set_xscale("log", base=2)
    left.set_xticks([4, 8, 16, 32, 64, 128, 256, 512], [4, 8, 16, 32, 64, 128, 256, 512])
    left.set_xlabel("tokens in a text")
    left.set_ylabel("texts")
    left.set_title(f"{len(lengths):,} docstrings, {sum(lengths):,} tokens", loc="left", fontweight="bold")

    bars = bars[::-1]
    colours = [COLOUR if bar.packed else GREY for bar in bars]
    drawn = right.barh([bar.label for bar in bars], [bar.speed for bar in bars], color=colours, height=0.62)
    right.bar_label(drawn, [f"{bar.speed:,.0f}  ({bar.ratio:.1f}x)" for bar in bars], padding=4, color=INK)
    right.set_xlim(0, max(bar.speed for bar in bars) * 1.3)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    right.set_xlabel("real tokens a second")
    right.set_title(f"all-MiniLM-L6-v2 on {where}", loc="left", fontweight="bold")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=0)
    left.grid(axis="y", color=GREY, alpha=0.35)
    right.grid(axis="x", color=GREY, alpha=0.35)
    for axes in (left, right):
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
