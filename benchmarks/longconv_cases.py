"""The cases of the long convolution's benchmarks, from longconv_cases.txt."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    channels: int
    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def equal_lengths(self) -> bool:
        return len(set(self.lengths)) == 1


def longconv_cases() -> list[Case]:
    cases = []
    for line in (Path(__file__).parent / "longconv_cases.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, channels, *groups = line.split()
        lengths = []
        for group in groups:
            length, _, count = group.partition("*")
            lengths += [int(length)] * int(count or 1)
        cases.append(Case(name, int(channels), tuple(lengths)))
    return cases
