"""The one list of scan and convolution problems: what is tested for accuracy, and what benchmarks can pick from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from cases import ALL, DTYPES, LENGTHS, MEDIUM, SMALL

STATES = (1, 2, 8, 16, 17, 64, 256)


@dataclass(frozen=True)
class ScanCase:
    name: str
    lengths: tuple[int, ...]
    states: int
    dtype: torch.dtype
    channels: int = 6
    groups: int = 1
    complex: bool = False
    constant: str = ""  # which of "B" and "C" are the same for every token
    D: bool = False
    z: bool = False
    delta_bias: bool = False
    delta_softplus: bool = False
    initial_states: bool = False
    reverse: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class ConvCase:
    name: str
    lengths: tuple[int, ...]
    width: int
    dtype: torch.dtype
    channels: int = 6
    bias: bool = False
    silu: bool = False
    initial_states: bool = False
    reverse: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


MAMBA = {"D": True, "z": True, "delta_bias": True, "delta_softplus": True}  # as the block calls it
EVERYTHING = MAMBA | {"initial_states": True, "reverse": True}
_OPTIONS = {"plain": {}, "mamba": MAMBA, "everything": EVERYTHING}


def _every_scan_shape() -> Iterator[ScanCase]:
    for states, groups, is_complex, (kind, options) in product(STATES, (1, 3), (False, True), _OPTIONS.items()):
        for lengths in (ALL, MEDIUM):
            name = f"n{states}-g{groups}-{'complex-' * is_complex}{kind}-{'all' if lengths is ALL else 'medium'}"
            for dtype in DTYPES:
                yield ScanCase(name, lengths, states, dtype, groups=groups, complex=is_complex, **options)


def _every_scan_length_alone() -> Iterator[ScanCase]:
    for length, states, (kind, options), dtype in product(LENGTHS, STATES, _OPTIONS.items(), DTYPES):
        channels = 64 if length <= 2 else 3  # of a few rows, plain torch's largest error would be a matter of luck
        yield ScanCase(f"alone{length}-n{states}-{kind}", (length,), states, dtype, channels, **options)


def _every_scan_combination() -> Iterator[ScanCase]:
    """Every option with and without every other."""
    switches = ("D", "z", "delta_bias", "delta_softplus", "initial_states", "reverse")
    for is_complex, constant, *on in product((False, True), ("", "B", "C", "BC"), *[(False, True)] * len(switches)):
        options = dict(zip(switches, on, strict=True))
        words = [word for word, is_on in options.items() if is_on]
        name = "+".join(["complex" if is_complex else "real", *(f"constant-{m}" for m in constant), *words])
        for dtype in DTYPES:
            yield ScanCase(*(name, SMALL, 4, dtype, 8), groups=2, complex=is_complex, constant=constant, **options)


def _every_scan_width() -> Iterator[ScanCase]:
    for channels, dtype in product((1, 7, 8, 32, 33, 100, 256, 1030), DTYPES):
        yield ScanCase(f"c{channels}", SMALL, 16, dtype, channels, **EVERYTHING)
    for dtype in DTYPES:
        yield ScanCase("c64-g64", SMALL, 5, dtype, 64, 64, **MAMBA)
        yield ScanCase("many-sequences", (1, 2, 3, 0) * 100, 16, dtype, **EVERYTHING)


SCAN_CASES: list[ScanCase] = [
    *_every_scan_shape(),
    *_every_scan_length_alone(),
    *_every_scan_combination(),
    *_every_scan_width(),
]


def _every_conv() -> Iterator[ConvCase]:
    switches = ("bias", "silu", "initial_states", "reverse")
    for width, *on in product(range(2, 9), *[(False, True)] * len(switches)):
        options = dict(zip(switches, on, strict=True))
        name = "+".join([f"w{width}", *(word for word, is_on in options.items() if is_on)])
        for dtype in DTYPES:
            yield ConvCase(name, SMALL if sum(on) % 2 else MEDIUM, width, dtype, **options)
    everything = dict.fromkeys(switches, True)
    for dtype in DTYPES:
        for width in (2, 4, 8):
            yield ConvCase(f"all-w{width}", ALL, width, dtype, **everything)
            yield ConvCase(f"short-w{width}", (1, 2, 0, 3, 1, 5, 7, 4), width, dtype, 64, **everything)
        for channels in (1, 7, 8, 32, 33, 100, 256, 1030):
            yield ConvCase(f"conv-c{channels}", SMALL, 4, dtype, channels, **everything)
        for length in LENGTHS:
            yield ConvCase(f"alone{length}", (length,), 4, dtype, 64, **everything)
        yield ConvCase("conv-many-sequences", (1, 2, 3, 0) * 100, 4, dtype, **everything)


CONV_CASES: list[ConvCase] = list(_every_conv())


def _share(cases: list) -> list:
    """A CPU's: each case in one dtype, in turn."""
    return [case for i, case in enumerate(cases) if case.dtype == DTYPES[i // len(DTYPES) % len(DTYPES)]]


# The long packs with few states cost the reference most; the many combinations are cut by a step that is prime to their
# switches, so that each stays with and without each other.
SCAN_ON_CPU: list[ScanCase] = [
    case
    for i, case in enumerate(_share(SCAN_CASES))
    if (case.lengths != ALL or case.states in (1, 16)) and (case.lengths != SMALL or i % 3 == 0)
]
CONV_ON_CPU: list[ConvCase] = _share(CONV_CASES)

# float64: the CPU alone takes it.
SCAN_CPU_ONLY: list[ScanCase] = [
    ScanCase(f"{'complex' if c else 'real'}-{kind}", MEDIUM, 5, torch.float64, 4, 2, complex=c, **options)
    for c, (kind, options) in product((False, True), _OPTIONS.items())
]
CONV_CPU_ONLY: list[ConvCase] = [
    ConvCase(f"wide-w{width}{'-reverse' * reverse}", MEDIUM, width, torch.float64, 5, True, True, True, reverse)
    for width, reverse in product((2, 4, 7), (False, True))
]
