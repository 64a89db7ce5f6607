"""The one list of filter and convolution problems: what is tested for accuracy, and what benchmarks can pick from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from cases import DTYPES, MEDIUM

LENGTHS = (1, 3, 17, 489, 1024, 1047, 14_113, 65_536, 262_144)
POLES = (1, 2, 6, 32, 64, 100, 256, 1024)

FILTERS = ("cauchy", "cauchy_conj", "vandermonde", "vandermonde_conj", "vandermonde_transpose", "s4_spectrum")


@dataclass(frozen=True)
class FilterCase:
    operator: str
    poles: int
    length: int
    groups: int = 1
    rows: int = 1
    rank: int = 0  # of s4_spectrum
    real: bool = False  # vandermonde_transpose's u
    dtype: torch.dtype = torch.complex64

    @property
    def name(self) -> str:
        what = f"{self.operator}{'_real' * self.real}-n{self.poles}-l{self.length}-{self.groups}x{self.rows}"
        return what + f"-rank{self.rank}" * (self.operator == "s4_spectrum")

    @property
    def terms(self) -> int:
        return self.groups * self.rows * self.poles * self.length

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def _every_filter() -> Iterator[FilterCase]:
    for operator, poles, length in product(FILTERS, POLES, LENGTHS):
        short = poles * length <= 100_000
        groups, rows = (2, 3) if short else (1, 1)
        if operator == "s4_spectrum":
            for rank in (0, 1, 2):
                yield FilterCase(operator, poles, length, groups, rows, rank)
        else:
            yield FilterCase(operator, poles, length, groups, rows)
            if operator == "vandermonde_transpose":
                yield FilterCase(operator, poles, length, groups, rows, real=True)
    for operator in FILTERS:
        yield FilterCase(operator, 5, 40, 1, 100, rank=1)
        yield FilterCase(operator, 5, 40, 100, 1, rank=1)
        yield FilterCase(operator, 33, 65, 3, 7, rank=2)


FILTER_CASES: list[FilterCase] = list(_every_filter())


def _share(cases: list, most: int) -> list:
    """A CPU's: the longest sums of one operator alone, in turn."""
    return [case for i, case in enumerate(cases) if case.terms <= most // 10 or (case.terms <= most and i % 4 == 0)]


FILTERS_ON_CPU: list[FilterCase] = _share(FILTER_CASES, 10_000_000)
FILTERS_CPU_ONLY: list[FilterCase] = [
    FilterCase(operator, poles, length, 2, 2, rank, real, torch.complex128)
    for operator, poles, length, (rank, real) in product(
        FILTERS, (1, 6, 100), (1, 17, 489), ((0, False), (1, False), (2, True))
    )
    if (operator == "s4_spectrum" or rank != 1) and (operator == "vandermonde_transpose" or not real or rank == 2)
]


@dataclass(frozen=True)
class ConvCase:
    name: str
    lengths: tuple[int, ...]
    taps: int
    dtype: torch.dtype
    channels: int = 3
    taps_after: int = 0
    D: bool = False
    pre_gate: bool = False
    gate: bool = False
    reverse: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


SWITCHES = ("D", "pre_gate", "gate", "reverse")
EVERYTHING = dict.fromkeys(SWITCHES, True)
RAGGED = (489, 0, 1, 1047, 64, 17, 65, 3, 130)


def _every_conv() -> Iterator[ConvCase]:
    for length, dtype in product(LENGTHS, DTYPES):
        channels = 64 if length <= 17 else 5 if length < 50_000 else 2
        for taps in sorted({1, 7, length // 2 + 1, length, 2 * length + 5}):
            yield ConvCase(f"alone{length}-k{taps}", (length,), taps, dtype, channels)
        yield ConvCase(f"alone{length}-everything", (length,), length, dtype, channels, length, **EVERYTHING)
    for taps_after, *on in product((0, 20, 700), *[(False, True)] * len(SWITCHES)):
        options = dict(zip(SWITCHES, on, strict=True))
        name = "+".join([f"after{taps_after}", *(word for word, is_on in options.items() if is_on)])
        for dtype in DTYPES:
            yield ConvCase(name, MEDIUM if sum(on) % 2 else RAGGED, 300, dtype, 4, taps_after, **options)
    for dtype in DTYPES:
        for channels in (1, 2, 7, 8, 32, 33, 100, 256, 1030):
            yield ConvCase(f"c{channels}", (65, 5, 0, 200), 150, dtype, channels, 30, **EVERYTHING)
        yield ConvCase("many-sequences", (1, 2, 3, 0, 70) * 60, 50, dtype, **EVERYTHING)


CONV_CASES: list[ConvCase] = list(_every_conv())
# A CPU's: each in one dtype, in turn.
CONV_ON_CPU: list[ConvCase] = [
    case for i, case in enumerate(CONV_CASES) if case.dtype == DTYPES[i // len(DTYPES) % len(DTYPES)]
]
CONV_CPU_ONLY: list[ConvCase] = [
    ConvCase(f"wide-k{taps}{'-all' * bool(options)}", RAGGED, taps, torch.float64, 3, 40 * bool(options), **options)
    for taps, options in product((1, 100, 2000), ({}, EVERYTHING))
]
