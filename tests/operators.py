"""Every operator as the promises see it: what goes in, what comes out, and whose row is whose.

To join, an operator adds itself to OPERATORS. A sequence's data depends on its length and a seed only, so the same
sequence can be packed anywhere, or run alone.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

import packseq
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor with a row for each token, or, of="sequences", for each sequence."""

    shape: tuple[int, ...]  # of a row
    of: str = "cu_seqlens"  # the boundaries that say whose row is whose
    statistics: bool = False  # float32 in any dtype but float64


@dataclass(frozen=True)
class Operator:
    id: str
    call: Callable[..., tuple[Tensor, ...]]  # with inputs, boundaries, shared and constants by name
    inputs: Mapping[str, Rows]
    outputs: Mapping[str, Rows]  # in the order that `call` returns them
    shared: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # parameters of all sequences, statistics' dtype
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # the same, without a gradient
    # Boundaries' names, and how many rows a sequence of length n has there.
    lengths: Mapping[str, Callable[[int], int]] = field(default_factory=lambda: {"cu_seqlens": lambda n: n})
    half: bool = True  # whether it takes half types
    moves: bool = False  # only moves rows: of any dtype and shape, under autocast too, with derivatives of any order
    big: bool = False  # whether it stands for its family beyond 2^31 elements

    def __str__(self) -> str:
        return self.id

    def count(self, rows: Rows, length: int) -> int:
        return 1 if rows.of == "sequences" else self.lengths[rows.of](length)


def statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=100)
def random(*shape: int, seed: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


Sequence = dict[str, Tensor]  # rows of each input, and under "d" + its name of each output's gradient


def draw(op: Operator, length: int, dtype: torch.dtype, seed: int = 0) -> Sequence:
    rows = {**op.inputs, **{"d" + name: output for name, output in op.outputs.items()}}
    return {
        name: random(
            op.count(r, length),
            *r.shape,
            seed=f"{name} {length} {seed}",
            dtype=statistics(dtype) if r.statistics else dtype,
        )
        for name, r in rows.items()
    }


@dataclass
class Batch:
    """What an operator is called with, and the gradients of its outputs."""

    arguments: dict[str, Tensor]
    gradients: dict[str, Tensor]
    differentiable: list[str]

    def detached(self) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in self.arguments.items()}


def boundaries(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def pack(op: Operator, lengths: list[int], sequences: list[Sequence], dtype: torch.dtype, device: str, slack: int = 0):
    """The sequences one after another, then `slack` rows of NaN."""

    def join(name: str, rows: Rows) -> Tensor:
        kind = statistics(dtype) if rows.statistics else dtype
        tail = torch.full((0 if rows.of == "sequences" else slack, *rows.shape), torch.nan, dtype=kind)
        return torch.cat([*(s[name] for s in sequences), tail]).to(device)

    def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {n: random(*shape, seed=n, dtype=statistics(dtype)).abs().to(device) for n, shape in shapes.items()}

    arguments = {name: join(name, rows) for name, rows in op.inputs.items()}
    arguments |= parameters(op.shared)
    for x in arguments.values():
        x.requires_grad_()
    differentiable = list(arguments)
    arguments |= parameters(op.constants)
    arguments |= {name: boundaries([f(n) for n in lengths], device) for name, f in op.lengths.items()}
    gradients = {name: join("d" + name, rows) for name, rows in op.outputs.items()}
    return Batch(arguments, gradients, differentiable)


def batch(op: Operator, lengths: list[int], dtype: torch.dtype, device: str, slack: int = 0) -> Batch:
    return pack(op, lengths, [draw(op, n, dtype, seed) for seed, n in enumerate(lengths)], dtype, device, slack)


def run(op: Operator, b: Batch, call: Callable | None = None) -> dict[str, Tensor]:
    """Every output by name, and under "d" + its name the gradient of every differentiable argument."""
    outputs = dict(zip(op.outputs, (call or op.call)(**b.arguments), strict=True))
    gradients = torch.autograd.grad(
        list(outputs.values()), [b.arguments[n] for n in b.differentiable], [b.gradients[n] for n in outputs]
    )
    results = {name: x.detach() for name, x in outputs.items()}
    return results | {"d" + name: g for name, g in zip(b.differentiable, gradients, strict=True)}


def rows_of(op: Operator) -> dict[str, Rows]:
    """The results that belong to sequences: all but the gradients of shared parameters."""
    return {**op.outputs, **{"d" + name: rows for name, rows in op.inputs.items()}}


def split(
    op: Operator, lengths: list[int], results: dict[str, Tensor]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Each sequence's results, and the slack's."""
    each: list[dict[str, Tensor]] = [{} for _ in lengths]
    slack = {}
    for name, rows in rows_of(op).items():
        counts = [op.count(rows, n) for n in lengths]
        *parts, slack[name] = results[name].split([*counts, len(results[name]) - sum(counts)])
        for one, part in zip(each, parts, strict=True):
            one[name] = part
    return each, slack


OPERATORS: list[Operator] = []


# ---- attention


def _attention(options: dict, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return packseq.attention(**tensors, **options, return_lse=True)


def _add_attention(
    id: str,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int | None = None,
    *,
    keys: Callable[[int], int] | None = None,
    slopes: bool = False,
    sinks: bool = False,
    big: bool = False,
    **options,
) -> None:
    dim_v = dim_v or dim
    of_k = "cu_seqlens_k" if keys else "cu_seqlens"
    OPERATORS.append(
        Operator(
            id=id,
            call=partial(_attention, options),
            inputs={
                "q": Rows((heads, dim)),
                "k": Rows((kv_heads, dim), of_k),
                "v": Rows((kv_heads, dim_v), of_k),
            },
            outputs={"out": Rows((heads, dim_v)), "lse": Rows((heads,), statistics=True)},
            shared={"sinks": (heads,)} if sinks else {},
            constants={"alibi_slopes": (heads,)} if slopes else {},
            lengths={"cu_seqlens": lambda n: n} | ({"cu_seqlens_k": keys} if keys else {}),
            big=big,
        )
    )


_add_attention("attention", 2, 2, 64, big=True)
_add_attention("attention-causal-gqa", 8, 2, 128, causal=True)
_add_attention(
    "attention-all-options",
    heads=4,
    kv_heads=1,
    dim=40,
    dim_v=24,
    slopes=True,
    sinks=True,
    causal=True,
    window=(45, None),
    sink_tokens=3,
    softcap=4.0,
    scale=0.2,
)
# Sequences with queries but no keys, and the other way round; queries before the first key.
_add_attention("attention-cross", 2, 1, 96, keys=lambda n: 3 if n == 0 else n * 2 // 3, causal=True, sinks=True)
_add_attention("attention-192", 2, 1, 192, 128, window=(20, 7), sink_tokens=2)
_add_attention("attention-256", 2, 1, 256, keys=lambda n: n + 70, softcap=6.0, slopes=True)


# ---- packseq.nn


def _mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> tuple[Tensor]:
    return (packseq.nn.mean_pool(hidden, cu_seqlens),)


OPERATORS.append(Operator("mean-pool", _mean_pool, {"hidden": Rows((96,))}, {"mean": Rows((96,), of="sequences")}))


# ---- packing


def _repack(tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor]:
    """Out to a padded batch and back."""
    padded = packseq.unpack(tokens, cu_seqlens, cu_seqlens.shape[0] - 1, tokens.shape[0], fill=9)
    return (packseq.pack(padded, lengths=cu_seqlens.diff(), capacity=tokens.shape[0])[0],)


OPERATORS.append(Operator("unpack-pack", _repack, {"tokens": Rows((12,))}, {"repacked": Rows((12,))}, moves=True))
