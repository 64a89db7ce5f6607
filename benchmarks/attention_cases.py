"""The attention benchmarks' cases, from the table that the C++ benchmarks read too."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    shape: str
    batch: str
    heads: int
    dim: int
    lengths: tuple[int, ...]
    causal: bool

    @property
    def name(self) -> str:
        return f"{self.shape} {self.batch} {'causal' if self.causal else 'full'}"

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def equal_lengths(self) -> bool:
        return len(set(self.lengths)) == 1

    def flops(self, backward: bool = False) -> float:
        """Of the matrix products of visible scores only: four a score and dim, 2.5 times that backward."""
        forward = 4.0 * sum(n * n for n in self.lengths) * self.heads * self.dim
        return forward * (0.5 if self.causal else 1.0) * (2.5 if backward else 1.0)


def attention_cases(suite: str) -> list[Case]:
    shapes, batches = [], []
    for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
        kind, of, name, *numbers = line.split() if line and not line.startswith("#") else ("", "", "")
        if of != suite:
            continue
        if kind == "shape":
            shapes.append((name, *map(int, numbers)))
        elif kind == "batch":
            batches.append((name, _lengths(numbers)))
        else:
            raise ValueError(f"attention_cases.txt: unknown kind of line {kind!r}, it must be shape or batch")
    return [
        Case(shape, batch, heads, dim, lengths, causal)
        for shape, heads, dim in shapes
        for batch, lengths in batches
        for causal in (False, True)
    ]


def _lengths(words: list[str]) -> tuple[int, ...]:
    lengths = []
    for word in words:
        length, _, times = word.partition("*")
        lengths += [int(length)] * int(times or 1)
    return tuple(lengths)
