"""The packing benchmarks' cases, from the table that the C++ benchmarks read too."""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    length: int
    row_bytes: int

    @property
    def lengths(self) -> list[int]:
        return [math.ceil(self.length * (0.2 + 0.8 * ((b + 1) * 0.6180339887498949 % 1))) for b in range(self.batch)]

    def bytes(self, pack: bool) -> float:
        """What must move: tokens read and written; unpacking writes the padding too, packing writes the indices."""
        tokens, rows = sum(self.lengths), self.batch * self.length
        return tokens * (2 * self.row_bytes + 8) if pack else (tokens + rows) * self.row_bytes


def packing_cases() -> list[Case]:
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    rows = (line.split() for line in lines if line and not line.startswith("#"))
    return [Case(name, *map(int, numbers)) for name, *numbers in rows]
