"""The scan benchmarks' cases, from the table that the C++ benchmarks read too."""

from dataclasses import dataclass
from pathlib import Path

STATES = 16


@dataclass(frozen=True)
class Case:
    name: str
    dtype: str  # bf16 or f32
    channels: int
    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def equal_lengths(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def steps(self) -> int:
        """Of the recurrence: one exp2 each."""
        return self.total * self.channels * STATES

    def bytes(self, backward: bool) -> int:
        """Each large tensor once: u, delta, z and out, and backward dout, du, ddelta and dz too."""
        return self.total * self.channels * (7 if backward else 4) * (2 if self.dtype == "bf16" else 4)


def scan_cases() -> list[Case]:
    cases = []
    for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, dtype, channels, *words = line.split()
        lengths = []
        for word in words:
            length, _, times = word.partition("*")
            lengths += [int(length)] * int(times or 1)
        cases.append(Case(name, dtype, int(channels), tuple(lengths)))
    return cases
