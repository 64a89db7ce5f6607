"""What the training examples share: a run that stops, and goes on, where it wants; and the loop around it."""

import argparse
import math
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from search_report import progress
from torch import nn


class Run(ABC):
    """A model, its optimizer and what was measured; all of it goes into a checkpoint and comes back.

    In ``held_out`` stand pairs of a step and what was measured then on data that are not trained on.
    """

    shaping: tuple[str, ...] = ()  # the options that must be the same on resuming

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> None:
        self.model, self.optimizer, self.options, self.device = model, optimizer, options, options.device
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    @abstractmethod
    def advance(self) -> int:
        """One step, which appends to ``losses``; how many tokens it had."""

    def descend(self, loss: torch.Tensor) -> None:
        """One step of the optimizer, with the rate that the schedule has for it."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self._schedule()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())

    def _schedule(self) -> float:
        """Up over the first 20th of the steps, then down a half cosine to a tenth."""
        warmup = max(1, self.options.steps // 20)
        if self.step < warmup:
            return (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, self.options.steps - warmup)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    def state(self) -> dict[str, object]:
        return {
            "options": {name: getattr(self.options, name) for name in self.shaping},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "held_out": self.held_out,
        }

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.state(), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)  # never half a checkpoint

    def restore(self, file: Path) -> dict[str, object]:
        """What :meth:`state` gave."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        for name, value in state["options"].items():
            if getattr(self.options, name) != value:
                flag = f"--{name.replace('_', '-')}"
                sys.exit(
                    f"{file} was trained with {flag} {value}: resume with the same, not {getattr(self.options, name)}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.held_out = state["losses"], [tuple(x) for x in state["held_out"]]
        return state


class Interrupt:
    """Waits for Ctrl-C, so that a step is never cut in two; a second one is not waited for."""

    def __enter__(self) -> "Interrupt":
        self.came, self.before = False, signal.signal(signal.SIGINT, self._take)
        return self

    def _take(self, *_) -> None:
        self.came = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)


def train(run: Run, evaluate: Callable[[], None], note: Callable[[], str]) -> bool:
    """Up to the last step, or --stop-at; False where Ctrl-C came first. Note and speed stand behind the bar."""
    options = run.options
    file, last = options.folder / "checkpoint.pt", min(options.steps, options.stop_at)
    tokens, start = 0, time.perf_counter()

    def note_and_speed() -> str:
        return f"{note()}, {tokens / (time.perf_counter() - start):9,.0f} tokens/s" if tokens else ""

    if run.step == 0:
        evaluate()
    with Interrupt() as interrupt:
        for _ in progress(range(run.step, last), "training", last - run.step, note_and_speed):
            tokens += run.advance()
            if run.step % options.save_every == 0 or run.step == options.steps:
                evaluate()
                run.save(file)
            if interrupt.came:
                break
    run.save(file)
    return not interrupt.came


def add_by_device(parser: argparse.ArgumentParser, flag: str, cpu: float, gpu: float, what: str) -> None:
    """A number whose default depends on the device: a pair, of which settle() leaves one."""
    what += f" (CPU: {cpu:g}, GPU: {gpu:g})"
    parser.add_argument(flag, type=type(cpu), default=(cpu, gpu), metavar="N", help=what)


def run_parser(description: str, folder: str) -> argparse.ArgumentParser:
    """A parser with the options of every run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_by_device(parser, "--steps", 400, 2000, "of the optimizer")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and drawing (%(default)s)")
    parser.add_argument("--device", type=torch.device, help="cpu or cuda (cuda where there is a GPU)")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="for results (%(default)s)")
    parser.add_argument(
        "--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (%(default)s)"
    )
    parser.add_argument("--stop-at", type=int, metavar="N", help="stop after step N, to be resumed")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    return parser


def settle(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with the device and what depends on it."""
    options = parser.parse_args(arguments)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in vars(options).items():
        if isinstance(value, tuple):
            setattr(options, name, value[options.device.type == "cuda"])
    if options.stop_at is None:
        options.stop_at = options.steps
    return options


def require(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """Ends the program where a number is too small, of these or of every run's."""
    for name, bound in {"steps": 1, "save_every": 1, "stop_at": 1, **least}.items():
        if getattr(options, name) < bound:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be at least {bound}, got {getattr(options, name)}")


def resume_from(options: argparse.Namespace) -> Path | None:
    """The checkpoint, where --resume asks for one."""
    file = options.folder / "checkpoint.pt"
    if options.resume and not file.exists():
        sys.exit(f"There is no {file} to resume from")
    return file if options.resume else None


def name_of(device: torch.device) -> str:
    gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
