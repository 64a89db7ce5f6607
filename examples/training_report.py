"""How the training examples show what was learned: the curve over the steps."""

from pathlib import Path

from search_report import COLOUR, GREY, INK


def smoothed(values: list[float], share: float = 0.02) -> list[float]:
    """A running mean in which the last ``share`` of all values counts most."""
    keep, mean, weight, out = 1 - 1 / max(1.0, share * len(values)), 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def save_plot(
    path: Path, values: list[float], held_out: list[tuple[int, float]], title: str, unit: str, highest: float
) -> None:
    """What was measured, over the steps: on each batch, the running mean, and on data that are not trained on."""
    figure, axes = _figure(path)
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=GREY, linewidth=0.7, label="each batch")
    axes.plot(steps, smoothed(values), color=COLOUR, linewidth=1.8, label="running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color=INK, markersize=5, label="held out")
        axes.annotate(f" {held_out[-1][1]:.2f}", held_out[-1], textcoords="offset points", xytext=(4, 6), color=INK)
    _finish(figure, axes, path, title, unit, highest)


def save_curves(path: Path, curves: dict[str, list[float]], title: str, unit: str) -> None:
    """Several runs over each other: each thinner than the one before, so that all are seen."""
    figure, axes = _figure(path)
    for i, (label, values) in enumerate(curves.items()):
        axes.plot(
            range(1, len(values) + 1), values, color=(GREY, COLOUR, INK)[i % 3], linewidth=4 / (1 + i), label=label
        )
    _finish(figure, axes, path, title, unit)


def _figure(path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})
    return plt.subplots(figsize=(8, 4.4), layout="constrained")


def _finish(figure, axes, path: Path, title: str, unit: str, highest: float | None = None) -> None:
    import matplotlib.pyplot as plt

    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_ylim(0, highest)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis="y", color=GREY, alpha=0.35)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
