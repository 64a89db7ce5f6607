"""The one list of attention problems: what is tested for accuracy, and what benchmarks can pick from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch

DIMS = (8, 40, 64, 96, 128, 192, 256)
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 257, 1000)
RATIOS = (1, 4, 8)  # query heads for each key head
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ALL = (127, 0, 1000, 1, 64, 2, 257, 63, 65)  # every length, in no order
MEDIUM = (65, 0, 127, 1, 257, 2)
SMALL = (5, 0, 70, 1, 33)

# Named settings of packseq.attention; alibi and sinks ask for slopes and sinks of one value a head.
MASKS: dict[str, dict] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (17, 5)},
    "left": {"window": (64, None)},
    "right": {"window": (None, 3)},
    "itself": {"window": (0, 0)},
    "causal-window": {"causal": True, "window": (70, None)},
    "lambda": {"causal": True, "window": (50, 0), "sink_tokens": 10},
    "far-sinks": {"window": (10, 30), "sink_tokens": 70},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": True},
    "causal-alibi": {"causal": True, "alibi": True},
    "sinks": {"sinks": True},
    "scale": {"scale": -0.3},
    "everything": {
        **{"causal": True, "window": (40, None), "sink_tokens": 3, "softcap": 3.0},
        **{"alibi": True, "sinks": True, "scale": 0.2},
    },
    "everything-both-ways": {"window": (33, 12), "sink_tokens": 2, "softcap": 3.0, "alibi": True, "sinks": True},
}


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    heads: int = 2
    kv_heads: int = 2
    dim_v: int | None = None  # like dim
    lengths_k: tuple[int, ...] | None = None  # like lengths
    options: dict = field(default_factory=dict)
    spread: float = 1.0  # standard deviation of q and k: large ones make the softmax pick single keys

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def _heads(ratio: int) -> dict[str, int]:
    return {1: {"heads": 2, "kv_heads": 2}, 4: {"heads": 8, "kv_heads": 2}, 8: {"heads": 8, "kv_heads": 1}}[ratio]


def _key_lengths(lengths: tuple[int, ...], kind: str) -> tuple[int, ...] | None:
    """Key lengths beside query lengths: none, fewer (rows that see nothing), more (as with a cache)."""
    return {
        "same": None,
        "fewer": tuple(n * 2 // 3 for n in lengths),
        "more": tuple(n + 37 if n % 2 else n for n in lengths),
    }[kind]


def _every_shape() -> Iterator[Case]:
    masks = ("full", "causal", "everything", "everything-both-ways")
    for dim, ratio, mask in product(DIMS, RATIOS, masks):
        for lengths in (ALL, MEDIUM):
            name = f"d{dim}-gqa{ratio}-{'all' if lengths is ALL else 'medium'}-{mask}"
            for dtype in DTYPES:
                yield Case(name, lengths, dim, dtype, **_heads(ratio), options=MASKS[mask])


def _every_length_alone() -> Iterator[Case]:
    for length, dim, mask, dtype in product(LENGTHS, DIMS, ("full", "causal"), DTYPES):
        heads = 32 if length <= 2 else 2  # of a few rows, plain torch's largest error would be a matter of luck
        yield Case(f"alone{length}-d{dim}-{mask}", (length,), dim, dtype, heads, heads, options=MASKS[mask])


def _every_mask() -> Iterator[Case]:
    for (mask, options), dim, dtype in product(MASKS.items(), (40, 128), DTYPES):
        yield Case(f"mask-{mask}-d{dim}", ALL, dim, dtype, **_heads(4), options=options)


def _every_combination() -> Iterator[Case]:
    """Every mask option with and without every other, with equal and different key lengths."""
    windows = {"": None, "window": (19, 6), "left": (30, None)}
    for causal, window, sink_tokens, softcap, alibi, sinks, keys in product(
        (False, True), windows, (0, 4), (0.0, 3.0), (False, True), (False, True), ("same", "fewer", "more")
    ):
        on = {"causal": causal, window: window, "first": sink_tokens, "cap": softcap, "alibi": alibi, "sinks": sinks}
        name = "+".join(["combined", *(word for word, is_on in on.items() if is_on), f"{keys}-keys"])
        options = {"causal": causal, "window": windows[window], "sink_tokens": sink_tokens, "softcap": softcap}
        options |= {"alibi": alibi, "sinks": sinks}
        for dtype in DTYPES:
            yield Case(*(name, SMALL, 64, dtype, 4, 2), dim_v=32, lengths_k=_key_lengths(SMALL, keys), options=options)


def _other_shapes() -> Iterator[Case]:
    for dtype in DTYPES:
        for dim, dim_v in ((64, 128), (128, 64), (192, 128), (8, 256), (256, 8), (72, 104)):
            yield Case(f"d{dim}-dv{dim_v}", MEDIUM, dim, dtype, 4, 2, dim_v, options=MASKS["causal"])
        for kind, mask in product(("fewer", "more"), ("full", "causal", "everything", "everything-both-ways")):
            yield Case(
                *(f"{kind}-keys-{mask}", MEDIUM, 128, dtype, 4, 1),
                lengths_k=_key_lengths(MEDIUM, kind),
                options=MASKS[mask],
            )
        yield Case("no-keys", (3, 70), 64, dtype, lengths_k=(0, 0), options=MASKS["sinks"])
        yield Case("no-queries", (0, 0), 64, dtype, lengths_k=(3, 70))
        yield Case("one-query-many-keys", (1, 1, 1), 64, dtype, 8, 1, lengths_k=(1000, 1, 300), options=MASKS["causal"])
        yield Case("many-sequences", (1, 2, 3, 0) * 100, 64, dtype, options=MASKS["causal"])
        yield Case("peaked", MEDIUM, 64, dtype, spread=5.0)
        yield Case("peaked-causal", MEDIUM, 128, dtype, 4, 1, spread=5.0, options=MASKS["causal"])


EVERY_CASE: list[Case] = [
    *_every_shape(),
    *_every_length_alone(),
    *_every_mask(),
    *_every_combination(),
    *_other_shapes(),
]

# A CPU's share: each case in one dtype, in turn, and the long packs for three head dims.
_LONG_ON_CPU = (40, 64, 256)
ON_CPU: list[Case] = [
    case
    for i, case in enumerate(EVERY_CASE)
    if case.dtype == DTYPES[i // len(DTYPES) % len(DTYPES)]
    and (case.lengths != ALL or (case.dim in _LONG_ON_CPU and case.heads == 2) or case.name == "mask-lambda-d40")
]

# A dim that GPUs refuse, and float64: the CPU alone takes them.
CPU_ONLY: list[Case] = [
    *(Case(f"d{dim}", SMALL, dim, dtype, 4, 2, options=MASKS["everything"]) for dim in (1, 3, 33) for dtype in DTYPES),
    *(Case(f"mask-{m}", SMALL, 24, torch.float64, 4, 2, options=options) for m, options in MASKS.items()),
    Case("wide", (9, 30), 300, torch.float32, options=MASKS["causal"]),
]
