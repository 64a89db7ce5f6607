"""Trains S4, S4D or H3 to tell drawn shapes apart that come pixel by pixel, as sequences of 1,024 to 2,304 values.

Pictures of all sizes are packed one after another: no pixel is padding, and no picture sees another. What is above a
pixel came 32 to 48 steps before it, so a class takes a long memory; guessing is right one time in four. Ctrl-C keeps a
checkpoint; --resume goes on from it, and ends with the same bits as a run that was never stopped (on the same machine,
with as many threads).
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from packseq.nn import H3, S4, S4D, mean_pool
from shapes import CLASSES, LONGEST, Pictures, draw
from torch import Tensor, nn
from training import Run, add_by_device, name_of, require, resume_from, run_parser, settle, train
from training_report import save_plot

LAYERS = {"s4": S4, "s4d": S4D, "h3": H3}
STATES = 64
RATE_OF_SSM = 2e-3  # the most for the state space models' own parameters
TEST_SEED = 2**40  # no batch of training has it


class Classifier(nn.Module):
    """Layers with residual connections over packed pixels, their mean over each picture, and a score a class."""

    def __init__(self, layer: str, d_model: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(layers))
        self.layers = nn.ModuleList(LAYERS[layer](d_model, LONGEST, STATES) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, len(CLASSES))

    def forward(self, pixels: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = self.encoder(pixels)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            hidden = hidden + layer(norm(hidden), cu_seqlens)
        return self.head(mean_pool(self.norm(hidden), cu_seqlens))


class Trainer(Run):
    """A run on pictures that the number of the step draws, so that the step is all there is to resume from."""

    shaping = ("layer", "steps", "pictures", "d_model", "layers", "learning_rate", "seed")

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        model = Classifier(options.layer, options.d_model, options.layers).to(options.device)
        own = [p for p in model.parameters() if hasattr(p, "_no_weight_decay")]
        others = [p for p in model.parameters() if not hasattr(p, "_no_weight_decay")]
        rate = options.learning_rate
        groups = [
            {"params": own, "lr": min(rate, RATE_OF_SSM), "weight_decay": 0.0},
            {"params": others, "lr": rate, "weight_decay": 0.01},
        ]
        super().__init__(model, torch.optim.AdamW(groups), options)
        self.right: list[float] = []  # the share of each batch

    def advance(self) -> int:
        batch = draw(self.options.pictures, self.options.seed * 1_000_003 + self.step).to(self.device)
        scores = self.model(batch.pixels, batch.cu_seqlens)
        self.descend(F.cross_entropy(scores, batch.classes))
        self.right.append(share_right(scores, batch))
        return len(batch.pixels)

    @torch.no_grad()
    def evaluate(self, batches: list[Pictures]) -> None:
        shares = [share_right(self.model(batch.pixels, batch.cu_seqlens), batch) for batch in batches]
        right = sum(share * len(batch.classes) for share, batch in zip(shares, batches, strict=True))
        self.held_out.append((self.step, 100 * right / sum(len(batch.classes) for batch in batches)))

    def state(self) -> dict[str, object]:
        return super().state() | {"right": self.right}

    def restore(self, file: Path) -> dict[str, object]:
        state = super().restore(file)
        self.right = state["right"]
        return state


def share_right(scores: Tensor, batch: Pictures) -> float:
    return (scores.argmax(dim=1) == batch.classes).float().mean().item()


def recent(trainer: Trainer) -> str:
    last = trainer.right[-20:]
    return f"{sum(last) / len(last):4.0%} right"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = run_parser(__doc__, "demo/train_s4")
    parser.add_argument("--layer", choices=LAYERS, default="s4", help="what the model is made of (%(default)s)")
    add_by_device(parser, "--pictures", 16, 64, "in a batch")
    add_by_device(parser, "--d-model", 64, 128, "width of the model")
    add_by_device(parser, "--layers", 2, 4, "of the model")
    parser.add_argument("--learning-rate", type=float, default=5e-3, metavar="N", help="its peak (%(default)s)")
    parser.add_argument("--tests", type=int, default=256, metavar="N", help="pictures to test with (%(default)s)")
    options = settle(parser, arguments)
    require(parser, options, pictures=1, d_model=1, layers=1, tests=1)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    resumed, where = resume_from(options), name_of(options.device)
    trainer = Trainer(options)
    if resumed:
        trainer.restore(resumed)
    count = sum(p.numel() for p in trainer.model.parameters())
    name = LAYERS[options.layer].__name__
    print(
        f"{options.layers} layers of {name}, {count:,} parameters, on {where}; from step {trainer.step}\n"
        f"A batch: {options.pictures} pictures, {', '.join(CLASSES)}, of 1,024 to {LONGEST:,} pixels",
        flush=True,
    )
    each = options.pictures
    starts = range(0, options.tests, each)
    tests = [draw(min(each, options.tests - i), TEST_SEED + i).to(options.device) for i in starts]
    uninterrupted = train(trainer, lambda: trainer.evaluate(tests), lambda: recent(trainer))
    if trainer.step < options.steps:
        print(f"\nStopped after {trainer.step} steps; the same command with --resume goes on from there.")
    for step, percent in trainer.held_out:
        print(f"  step {step:6,}: {percent:5.1f}% of {options.tests} new pictures right")
    plot = options.folder / "accuracy.png"
    title = f"{name}, {count:,} parameters, on {where}"
    save_plot(plot, [100 * share for share in trainer.right], trainer.held_out, title, "% right", 102)
    print(f"Accuracy curve: {plot}\nCheckpoint: {options.folder / 'checkpoint.pt'}")
    return 0 if uninterrupted else 130


if __name__ == "__main__":
    sys.exit(main())
