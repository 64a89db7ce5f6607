"""Drawn shapes, row by row one long sequence of pixels, made on the spot: the data of train_s4.py.

Pictures have 32x32 to 48x48 pixels, each its own size, so a pixel's neighbour above came 32 to 48 steps before it, and
a shape takes up to two thousand steps. No part of a sequence tells the class.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = ("ring", "square", "triangle", "cross")
SIDES = (32, 48)  # the least and the most, of height and width
LONGEST = SIDES[1] ** 2


@dataclass
class Pictures:
    """Pictures one after another: a value for each pixel, the boundaries, and the number of each one's class."""

    pixels: Tensor  # [total, 1]
    cu_seqlens: Tensor  # int32 [pictures + 1]
    classes: Tensor  # [pictures]

    def to(self, device: torch.device) -> "Pictures":
        return Pictures(self.pixels.to(device), self.cu_seqlens.to(device), self.classes.to(device))


def draw(count: int, seed: int) -> Pictures:
    """``count`` pictures, always the same ones for a seed: outlines of any size, place and turn, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    classes = torch.randint(len(CLASSES), (count,), generator=generator)
    pictures = []
    for kind in classes.tolist():
        height, width = (round(uniform(*SIDES)) for _ in range(2))
        radius = uniform(0.25, 0.42) * min(height, width)
        x, y = _turned(height, width, radius, uniform)
        distance = _outline(CLASSES[kind], x, y, radius)
        line = (1 - (distance.abs() - uniform(0.5, 1.2)).clamp(min=0)).clamp(min=0)  # with soft edges
        noise = torch.randn(height, width, generator=generator)
        pictures.append((uniform(0.7, 1.3) * line + 0.1 * noise).flatten())
    lengths = torch.tensor([0, *map(len, pictures)])
    return Pictures(torch.cat(pictures)[:, None], lengths.cumsum(0).int(), classes)


def _turned(height: int, width: int, radius: float, uniform) -> tuple[Tensor, Tensor]:
    """Each pixel's place, from a middle that leaves room for the shape, turned by up to 17 degrees."""
    rows = torch.arange(height)[:, None] - uniform(radius, height - 1 - radius)
    columns = torch.arange(width) - uniform(radius, width - 1 - radius)
    angle = uniform(-0.3, 0.3)
    return (
        math.cos(angle) * columns + math.sin(angle) * rows,
        math.cos(angle) * rows - math.sin(angle) * columns,
    )


def _outline(kind: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """How far each place is from the line, in pixels."""
    if kind == "ring":
        return torch.hypot(x, y) - radius
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8 * radius
    if kind == "triangle":  # the largest distance from three sides
        return torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y) - 0.5 * radius
    outside = torch.maximum(x.abs(), y.abs()) - radius
    return torch.maximum(torch.minimum(x.abs(), y.abs()), outside)
