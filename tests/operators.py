"""Every operator as the promises see it: what goes in, what comes out, and whose row is whose.

To join, an operator adds itself to OPERATORS. A sequence's data depends on its length and a seed only, so the same
sequence can be packed anywhere, or run alone.
"""

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    complex: frozenset[str] = frozenset()  # names of what is complex, of statistics' width
    inference: bool = False  # without any gradient
    moves: bool = False  # only moves rows: of any dtype and shape, under autocast too, with derivatives of any order
    big: bool = False  # whether it stands for its family beyond 2^31 elements
    composed: bool = False  # in part of torch's own operators, which a compiler may fuse, and so round otherwise

    def __str__(self) -> str:
        return self.id

    def count(self, rows: Rows, length: int) -> int:
        return 1 if rows.of == "sequences" else self.lengths[rows.of](length)

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Of an input or output by its name, or of a parameter, where the operator is called with `dtype`."""
        rows = self.inputs.get(name) or self.outputs.get(name)
        kind = dtype if rows and not rows.statistics else statistics(dtype)
        return kind.to_complex() if name in self.complex else kind


def statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=100)
def random(*shape: int, seed: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


Sequence = dict[str, Tensor]  # rows of each input, and under "d" + its name of each output's gradient


def draw(op: Operator, length: int, dtype: torch.dtype, seed: int = 0) -> Sequence:
    def rows_of(name: str, rows: Rows, prefix: str = "") -> Tensor:
        kind = op.dtype_of(name, dtype)
        return random(op.count(rows, length), *rows.shape, seed=f"{prefix}{name} {length} {seed}", dtype=kind)

    inputs = {name: rows_of(name, rows) for name, rows in op.inputs.items()}
    return inputs | {"d" + name: rows_of(name, rows, "d") for name, rows in op.outputs.items()}


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

    def join(name: str, rows: Rows, prefix: str = "") -> Tensor:
        rest = 0 if rows.of == "sequences" else slack
        tail = torch.full((rest, *rows.shape), torch.nan, dtype=op.dtype_of(name, dtype))
        return torch.cat([*(s[prefix + name] for s in sequences), tail]).to(device)

    def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
        x = random(*shape, seed=name, dtype=op.dtype_of(name, dtype))
        return (torch.complex(x.real.abs(), x.imag) if x.is_complex() else x.abs()).to(device)

    def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: parameter(name, shape) for name, shape in shapes.items()}

    arguments = {name: join(name, rows) for name, rows in op.inputs.items()}
    arguments |= parameters(op.shared)
    differentiable = [] if op.inference else list(arguments)
    for name in differentiable:
        arguments[name].requires_grad_()
    arguments |= parameters(op.constants)
    arguments |= {name: boundaries([f(n) for n in lengths], device) for name, f in op.lengths.items()}
    gradients = {name: join(name, rows, "d") for name, rows in op.outputs.items()}
    return Batch(arguments, gradients, differentiable)


def batch(op: Operator, lengths: list[int], dtype: torch.dtype, device: str, slack: int = 0) -> Batch:
    return pack(op, lengths, [draw(op, n, dtype, seed) for seed, n in enumerate(lengths)], dtype, device, slack)


def run(op: Operator, b: Batch, call: Callable | None = None) -> dict[str, Tensor]:
    """Every output by name, and under "d" + its name the gradient of every differentiable argument."""
    outputs = dict(zip(op.outputs, (call or op.call)(**b.arguments), strict=True))
    if op.inference:
        return outputs
    gradients = torch.autograd.grad(
        list(outputs.values()), [b.arguments[n] for n in b.differentiable], [b.gradients[n] for n in outputs]
    )
    results = {name: x.detach() for name, x in outputs.items()}
    return results | {"d" + name: g for name, g in zip(b.differentiable, gradients, strict=True)}


def rows_of(op: Operator) -> dict[str, Rows]:
    """The results that belong to sequences: all but the gradients of shared parameters."""
    return {**op.outputs, **({} if op.inference else {"d" + name: rows for name, rows in op.inputs.items()})}


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


def free_memory(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of a call, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


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


def _added(q: Tensor, cu_seqlens: Tensor, options: dict, **tensors: Tensor) -> dict:
    """What both operators of keys that come in parts take: queries that begin 70 keys into their sequences."""
    sequences = max(cu_seqlens.shape[0] - 1, 0)
    first = [q.new_full((sequences, 1), place, dtype=torch.int32) for place in (70, 0)]
    defaults = {"causal": False, "window_left": -1, "window_right": -1, "sink_tokens": 0, "softcap": 0.0}
    rest = {"alibi_slopes": None, "scale": None}
    return {"q": q, "cu_seqlens": cu_seqlens, "positions": torch.cat(first, 1)} | defaults | rest | options | tensors


def _attention_accumulate(options: dict, q: Tensor, v: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = (q.new_zeros(*q.shape[:2], n, dtype=statistics(q.dtype)) for n in (v.shape[-1], 2))
    torch.ops.packseq.attention_accumulate(out=out, sums=sums, v=v, **_added(q, options=options, **tensors))
    level, weight = sums.unbind(-1)  # which power of two the sums are relative to is a kernel's own choice
    return out * level.exp2()[..., None], weight * level.exp2()


def _attention_accumulate_backward(
    options: dict, add_to_keys: bool, q: Tensor, k: Tensor, v: Tensor, **tensors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_zeros(x.shape, dtype=statistics(q.dtype)) for x in (q, k, v))
    torch.ops.packseq.attention_accumulate_backward(
        **{"dq": dq, "dk": dk, "dv": dv, "add_to_keys": add_to_keys, "k": k, "v": v},
        **_added(q, options=options, **tensors),
    )
    return dq, dk, dv


def _add_attention_accumulate(
    id: str, heads: int, kv_heads: int, dim: int, dim_v: int, add_to_keys: bool, **options
) -> None:
    q, k, v = Rows((heads, dim)), Rows((kv_heads, dim), "cu_seqlens_k"), Rows((kv_heads, dim_v), "cu_seqlens_k")
    of_rows = Rows((heads,), statistics=True)
    forward = {"out": Rows((heads, dim_v), statistics=True), "weight": of_rows}
    backward = {"d" + name: replace(rows, statistics=True) for name, rows in {"q": q, "k": k, "v": v}.items()}
    gradients = {"dout": Rows((heads, dim_v)), "lse": of_rows, "delta": of_rows}
    for name, call, inputs, outputs in (
        (id, partial(_attention_accumulate, options), {}, forward),
        (f"{id}-backward", partial(_attention_accumulate_backward, options, add_to_keys), gradients, backward),
    ):
        OPERATORS.append(
            Operator(
                id=name,
                call=call,
                inputs={"q": q, "k": k, "v": v} | inputs,
                outputs=outputs,
                lengths={"cu_seqlens": lambda n: n, "cu_seqlens_k": lambda n: n + 70 if n else 3},
                inference=True,
            )
        )


_add_attention_accumulate("attention-accumulate", 4, 2, 128, 128, False, causal=True)
_add_attention_accumulate("attention-accumulate-window", 2, 1, 40, 72, True, window_left=20, sink_tokens=2, softcap=4.0)


# ---- selective scan and causal convolution


def _decaying(A: Tensor) -> Tensor:
    return (-0.05 * A).to(A.dtype)  # slowly, where delta can be negative too


def _scan(options: dict, A: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return packseq.selective_scan(A=_decaying(A), **tensors, **options, return_final_states=True)


def _stepped(step: Callable[..., Tensor], states: Tensor, indexed: bool, **arguments) -> tuple[Tensor, Tensor]:
    """The outputs, and the sequences' states afterwards; indexed: in a pool that holds the last one first."""
    if not indexed:
        pool = states.clone()
        return step(pool, **arguments), pool
    pool, n = states.flip(0), states.shape[0]
    indices = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=states.device)
    return step(pool, **arguments, indices=indices), pool.flip(0)


def _scan_step(options: dict, indexed: bool, states: Tensor, A: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return _stepped(packseq.selective_scan_step, states, indexed, A=_decaying(A), **tensors, **options)


def _add_scan(
    id: str,
    channels: int,
    states: int,
    groups: int = 1,
    *,
    constant: str = "",
    complex: bool = False,
    z: bool = False,
    D: bool = False,
    delta_bias: bool = False,
    initial_states: bool = False,
    step: bool = False,
    indexed: bool = False,
    big: bool = False,
    **options,
) -> None:
    of_sequences = Rows((channels, states), of="sequences", statistics=True)
    inputs = {"u": Rows((channels,)), "delta": Rows((channels,))}
    shared = {"A": (channels, states)}
    for name in ("B", "C"):
        if name in constant:
            shared[name] = (channels, states)
        else:
            inputs[name] = Rows((groups, states), statistics=complex)
    if z:
        inputs["z"] = Rows((channels,))
    if D:
        shared["D"] = (channels,)
    if delta_bias:
        shared["delta_bias"] = (channels,)
    if initial_states or step:
        inputs["states" if step else "initial_states"] = of_sequences
    OPERATORS.append(
        Operator(
            id=id,
            call=partial(_scan_step, options, indexed) if step else partial(_scan, options),
            inputs=inputs,
            outputs={"out": Rows((channels,)), "new_states" if step else "final_states": of_sequences},
            shared=shared,
            complex=frozenset(("A", "B", "C", "states", "initial_states", "new_states", "final_states") * complex),
            inference=step,
            big=big,
        )
    )


_add_scan("scan", 64, 16, 4, big=True)
_add_scan(
    *("scan-all-options", 24, 9, 2),
    **{"z": True, "D": True, "delta_bias": True, "delta_softplus": True, "initial_states": True},
)
_add_scan(
    "scan-constant-reverse", 64, 4, constant="BC", delta_softplus=True, initial_states=True, reverse=True, big=True
)
_add_scan("scan-complex", 6, 5, 3, constant="B", complex=True, z=True, delta_softplus=True, initial_states=True)
_add_scan("scan-256", 3, 256, D=True, reverse=True)
_add_scan("scan-step", 24, 16, 2, z=True, D=True, delta_bias=True, delta_softplus=True, step=True, big=True)
_add_scan("scan-step-indices", 24, 16, 2, z=True, delta_bias=True, step=True, indexed=True)
_add_scan("scan-step-complex", 5, 3, constant="C", complex=True, step=True)


def _conv1d(options: dict, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return packseq.causal_conv1d(**tensors, **options, return_final_states=True)


def _conv1d_step(options: dict, indexed: bool, states: Tensor, x: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # the pool's dtype is its owner's choice
        states = states.to(torch.get_autocast_dtype(x.device.type))
    return _stepped(packseq.causal_conv1d_step, states, indexed, x=x, **tensors, **options)


def _add_conv1d(
    id: str,
    channels: int,
    width: int,
    *,
    bias: bool = False,
    states: str = "",
    indexed: bool = False,
    big: bool = False,
    **options,
) -> None:
    step = states == "states"
    of_sequences = Rows((channels, width - 1), of="sequences")
    OPERATORS.append(
        Operator(
            id=id,
            call=partial(_conv1d_step, options, indexed) if step else partial(_conv1d, options),
            inputs={"x": Rows((channels,))} | ({states: of_sequences} if states else {}),
            outputs={"out": Rows((channels,)), "new_states" if step else "final_states": of_sequences},
            shared={"weight": (channels, width)} | ({"bias": (channels,)} if bias else {}),
            inference=step,
            big=big,
        )
    )


_add_conv1d("conv1d", 64, 4, big=True)
_add_conv1d("conv1d-all-options", 37, 3, bias=True, states="initial_states", activation="silu", reverse=True)
_add_conv1d("conv1d-8", 8, 8, bias=True, states="initial_states")
_add_conv1d("conv1d-step", 24, 4, bias=True, states="states", activation="silu", big=True)
_add_conv1d("conv1d-step-indices", 11, 3, states="states", indexed=True)


# ---- long convolution and S4's recurrence


def _long_conv(options: dict, **tensors: Tensor) -> tuple[Tensor]:
    return (packseq.long_conv(**tensors, **options),)


def _long_conv_with_states(options: dict, initial_states: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    """With modes that are no argument, the same for every channel."""
    shape = initial_states.shape[-2:]
    real = torch.float64 if initial_states.dtype == torch.complex128 else torch.float32
    n = torch.arange(shape[1], device=initial_states.device, dtype=real).expand(shape)
    modes = torch.complex(-0.02 * (n + 1), n), torch.complex(n + 1, n), torch.complex(1 / (n + 1), -n)
    states = {"initial_states": initial_states, "return_final_states": True}
    return packseq.long_conv(**tensors, **options, modes=modes, **states)


def _add_long_conv(
    id: str,
    channels: int,
    taps: int,
    taps_after: int = 0,
    *,
    D: bool = False,
    pre_gate: bool = False,
    gate: bool = False,
    states: int = 0,
    big: bool = False,
    **options,
) -> None:
    rows, of_sequences = Rows((channels,)), Rows((channels, states), of="sequences", statistics=True)
    inputs = {"u": rows} | ({"pre_gate": rows} if pre_gate else {}) | ({"gate": rows} if gate else {})
    shared = {"k": (channels, taps)} | ({"k_after": (channels, taps_after)} if taps_after else {})
    OPERATORS.append(
        Operator(
            id=id,
            call=partial(_long_conv_with_states if states else _long_conv, options),
            inputs=inputs | ({"initial_states": of_sequences} if states else {}),
            outputs={"out": rows} | ({"final_states": of_sequences} if states else {}),
            shared=shared | ({"D": (channels,)} if D else {}),
            complex=frozenset(("initial_states", "final_states")),
            big=big,
            composed=states > 0,
        )
    )


_add_long_conv("long-conv", 64, 500, big=True)
_add_long_conv("long-conv-short-filter", 5, 40, D=True, gate=True)
_add_long_conv("long-conv-all-options", 13, 37, 300, D=True, pre_gate=True, gate=True, reverse=True)
_add_long_conv("long-conv-states", 6, 600, D=True, pre_gate=True, gate=True, states=3)
_add_long_conv("long-conv-states-reverse", 1, 600, states=2, reverse=True)


def _s4_step(options: dict, indexed: bool, states: Tensor, w: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return _stepped(packseq.s4_step, states, indexed, w=_decaying(w), **tensors, **options)


def _add_s4_step(
    id: str,
    channels: int,
    poles: int,
    rank: int,
    filters: int,
    *,
    D: bool = False,
    indexed: bool = False,
    big: bool = False,
    **options,
) -> None:
    of_sequences = Rows((channels, poles), of="sequences", statistics=True)
    shared = {"w": (channels, poles), "B": (channels, poles), "C": (filters, channels, poles), "dt": (channels,)}
    OPERATORS.append(
        Operator(
            id=id,
            call=partial(_s4_step, options, indexed),
            inputs={"u": Rows((channels,)), "states": of_sequences},
            outputs={"out": Rows((filters, channels)), "new_states": of_sequences},
            shared=shared
            | ({"P": (rank, channels, poles)} if rank else {})
            | ({"D": (filters, channels)} if D else {}),
            complex=frozenset(("w", "B", "C", "P", "states", "new_states")),
            inference=True,
            big=big,
        )
    )


_add_s4_step("s4-step", 24, 32, 1, 1, D=True, big=True)
_add_s4_step("s4-step-indices", 5, 7, 1, 2, indexed=True)
_add_s4_step("s4-step-rank-2", 7, 5, 2, 3)
_add_s4_step("s4-step-zoh", 3, 65, 0, 2, D=True, discretization="zoh")


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
