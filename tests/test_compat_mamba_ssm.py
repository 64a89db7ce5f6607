"""packseq.compat.mamba_ssm on the test grids that mamba-ssm and causal-conv1d publish, their shapes, dtypes and
tolerances, against the formulas in plain torch; and what those libraries' tests leave out: gradients through states,
constant and complex matrices in half types, padding, skipped slots.
"""

import math
from dataclasses import dataclass
from itertools import pairwise, product

import packseq.compat.mamba_ssm as compat
import pytest
import torch
import torch.nn.functional as F
from compare import EXP2_ERROR, assert_accurate, assert_same_bits
from operators import random
from torch import Tensor

F32, F16, BF16, C64 = torch.float32, torch.float16, torch.bfloat16, torch.complex64

itypes = pytest.mark.parametrize("itype", [F32, F16, BF16], ids=lambda t: str(t).removeprefix("torch."))


def normal(*shape: int, seed: str, device: str, dtype: torch.dtype = F32) -> Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(random(*shape, 2, seed=seed, dtype=F32).to(device)) * math.sqrt(0.5)
    return random(*shape, seed=seed, dtype=F32).to(device, dtype)


def uniform(*shape: int, seed: str, device: str, dtype: torch.dtype = F32) -> Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(uniform(*shape, 2, seed=seed, device=device))
    return torch.special.ndtr(random(*shape, seed=seed, dtype=torch.float64)).to(device, dtype)


def leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_()


def assert_close(name: str, got: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


# ---- the formulas, in the layout (batch, dim, length)


def plain_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Out and the last state."""
    dtype, (dim, dstate) = u.dtype, A.shape
    wide = torch.promote_types(dtype, F32)
    u, delta = u.to(wide), delta.to(wide)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def tokens(matrix: Tensor) -> Tensor:
        """(batch or 1, dim, dstate, length or 1)"""
        if matrix.dim() == 2:
            return matrix[None, :, :, None]
        matrix = matrix.to(wide)
        if A.is_complex():
            matrix = torch.complex(matrix[..., 0::2], matrix[..., 1::2])
        grouped = matrix if matrix.dim() == 4 else matrix[:, None]
        return grouped.repeat_interleave(dim // grouped.shape[1], 1)

    decay = torch.exp(delta[:, :, None] * A[None, :, :, None])
    pushed = (delta * u)[:, :, None] * tokens(B)
    state, states = A.new_zeros(u.shape[0], dim, dstate), []
    for a, b in zip(decay.unbind(-1), pushed.unbind(-1), strict=True):
        state = a * state + b
        states.append(state)
    y = (torch.stack(states, -1) * tokens(C)).sum(2)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(dtype), state


def plain_conv(x, weight, bias=None, activation=None, initial_states=None):
    """Out and the final states."""
    width, length, wide = weight.shape[1], x.shape[2], torch.promote_types(x.dtype, F32)
    before = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], 2)
    out = sum(weight[:, k : k + 1] * padded[:, :, k : k + length].to(wide) for k in range(width))
    out = out if bias is None else out + bias[:, None]
    return (out if activation is None else F.silu(out)).to(x.dtype), padded[:, :, length:]


# ---- selective_scan_fn

SWITCHES = ["D", "z", "delta_bias", "delta_softplus"]


@dataclass(frozen=True)
class Scan:
    length: int
    groups: int = 1
    variable_B: bool = True
    variable_C: bool = True
    wtype: torch.dtype = F32
    itype: torch.dtype = F32
    D: bool = True
    z: bool = True
    delta_bias: bool = True
    delta_softplus: bool = True

    def __str__(self) -> str:
        kind = f"{self.length}-g{self.groups}-{'complex' if self.wtype.is_complex else 'real'}-{self.itype}"
        words = [name for name in ("variable_B", "variable_C", *SWITCHES) if getattr(self, name)]
        return "-".join([kind.replace("torch.", ""), *words])

    def inputs(self, device: str) -> dict[str, Tensor | None]:
        batch, dim, dstate = 2, 4, 8
        seed = f"{self.length} {self.groups}"
        matrices = {}
        for name, variable in (("B", self.variable_B), ("C", self.variable_C)):
            if not variable:
                matrices[name] = normal(dim, dstate, seed=name, device=device, dtype=self.wtype)
                continue
            length = self.length * (2 if self.wtype.is_complex else 1)
            groups = [self.groups] if self.groups > 1 else []
            shape = (batch, *groups, dstate, length)
            matrices[name] = normal(*shape, seed=name + seed, device=device, dtype=self.itype)
        shape = (batch, dim, self.length)
        return {
            "u": normal(*shape, seed="u" + seed, device=device, dtype=self.itype),
            "delta": 0.5 * uniform(*shape, seed="delta" + seed, device=device, dtype=self.itype),
            "A": -0.5 * uniform(dim, dstate, seed="A", device=device, dtype=self.wtype),
            **matrices,
            "D": normal(dim, seed="D", device=device) if self.D else None,
            "z": normal(*shape, seed="z" + seed, device=device, dtype=self.itype) if self.z else None,
            "delta_bias": 0.5 * uniform(dim, seed="bias", device=device) if self.delta_bias else None,
        }

    def tolerance(self) -> tuple[float, float]:
        return {F32: (6e-4, 2e-3), F16: (3e-3, 5e-3), BF16: (3e-2, 5e-2)}[self.itype]


PUBLISHED = [Scan(length, groups) for length, groups in product([128, 256, 512, 1024, 2048, 4096], [1, 2])]
# Their parametrisation holds these too, commented out.
MATRICES = [{}, {"groups": 2}, {"variable_B": False}, {"variable_C": False}, {"variable_B": False, "variable_C": False}]
COMMENTED = [
    Scan(length, wtype=wtype, itype=itype, **matrices)
    for length, wtype, itype, matrices in product([16, 128], [F32, C64], [F32, F16, BF16], MATRICES)
] + [
    Scan(37, wtype=wtype, **dict(zip(SWITCHES, on, strict=True)))
    for wtype, *on in product([F32, C64], *[[False, True]] * len(SWITCHES))
]


@pytest.mark.parametrize("case", dict.fromkeys(PUBLISHED + COMMENTED), ids=str)
def test_selective_scan(case, device):
    ours = {name: leaf(x) for name, x in case.inputs(device).items()}
    theirs = {name: leaf(x) for name, x in case.inputs(device).items()}
    out, state = compat.selective_scan_fn(**ours, delta_softplus=case.delta_softplus, return_last_state=True)
    plain_out, plain_state = plain_scan(**theirs, delta_softplus=case.delta_softplus)
    rtol, atol = case.tolerance()
    assert out.dtype == case.itype
    assert state.dtype == case.wtype
    assert_close("out", out, plain_out, rtol, atol)
    assert_close("last_state", state, plain_state, rtol, atol)
    seed = normal(*out.shape, seed="dout", device=device, dtype=case.itype)
    out.backward(seed)
    plain_out.backward(seed)
    rtolw = max(1e-3, rtol) if case.z else 1e-3
    atolw = max(1e-3, atol) if case.z else 1e-3
    limits = {
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (rtolw, 5 * atolw),
        "B": (rtol, atol) if case.variable_B else (rtolw, atolw),
        "C": (rtol, atol) if case.variable_C else (rtolw, atolw),
        **dict.fromkeys(("D", "z", "delta_bias"), (rtolw, atolw)),
    }
    for name, x in ours.items():
        if x is not None:
            assert_close("d" + name, x.grad, theirs[name].grad, *limits[name])


@pytest.mark.parametrize("wtype", [F32, C64])
def test_gradient_through_the_last_state(wtype, device):
    """mamba-ssm leaves it out."""
    case = Scan(19, wtype=wtype)
    ours = {name: leaf(x) for name, x in case.inputs(device).items()}
    theirs = {name: leaf(x) for name, x in case.inputs(device).items()}
    for function, inputs in ((compat.selective_scan_fn, ours), (plain_scan, theirs)):
        options = {"return_last_state": True} if function is compat.selective_scan_fn else {}
        out, state = function(**inputs, delta_softplus=True, **options)
        (out.sum() + state.abs().square().sum()).backward()
    for name, x in ours.items():
        assert_close("d" + name, x.grad, theirs[name].grad, 1e-4, 1e-4)


def test_lengths_of_zero_and_one_and_no_batch(device):
    for batch, length in ((2, 0), (0, 5), (1, 1)):
        u = torch.ones(batch, 4, length, device=device)
        B = torch.ones(batch, 8, length, device=device)
        A = -torch.ones(4, 8, device=device)
        out, state = compat.selective_scan_fn(u, u, A, B, B, return_last_state=True)
        assert out.shape == u.shape
        assert state.shape == (batch, 4, 8)
        assert (out == 8).all()
        assert compat.causal_conv1d_fn(u, torch.ones(4, 3, device=device)).shape == u.shape


# ---- mamba_inner_fn


@pytest.mark.parametrize("wtype", [F32, C64], ids=["real", "complex"])
@pytest.mark.parametrize("variable_C", [False, True])
@pytest.mark.parametrize("variable_B", [False, True])
def test_mamba_inner(variable_B, variable_C, wtype, device):
    batch, dim, length, dstate, rank = 2, 768, 128, 8, 48
    width = dstate * (2 if wtype.is_complex else 1)
    rows = rank + (variable_B + variable_C) * width

    def inputs(dtype: torch.dtype) -> dict[str, Tensor | None]:
        options = {"device": device}
        tensors = {
            "xz": normal(batch, 2 * dim, length, seed="xz", **options),
            "conv1d_weight": normal(dim, 1, 3, seed="conv", **options),
            "conv1d_bias": normal(dim, seed="conv bias", **options),
            # Smaller than the published ones, of which the outputs are up to 1e8.
            "x_proj_weight": normal(rows, dim, seed="x_proj", **options) / math.sqrt(dim),
            "delta_proj_weight": normal(dim, rank, seed="delta_proj", **options) / math.sqrt(rank),
            "out_proj_weight": normal(dim // 2, dim, seed="out_proj", **options) / math.sqrt(dim),
            "A": -0.5 * uniform(dim, dstate, seed="A", device=device, dtype=wtype),
            "B": None if variable_B else normal(dim, dstate, seed="B", device=device, dtype=wtype),
            "C": None if variable_C else normal(dim, dstate, seed="C", device=device, dtype=wtype),
            "D": normal(dim, seed="D", **options),
            "delta_bias": 0.5 * uniform(dim, seed="delta bias", **options),
        }
        return {
            name: x if x is None else leaf(x.to(dtype.to_complex() if x.is_complex() else dtype))
            for name, x in tensors.items()
        }

    seed = normal(batch, length, dim // 2, seed="dout", device=device)
    results = []
    for function, dtype in ((plain_inner, torch.float64), (plain_inner, F32), (compat.mamba_inner_fn, F32)):
        tensors = inputs(dtype)
        out = function(**tensors, out_proj_bias=None)
        out.backward(seed.to(dtype))
        results.append({"out": out.detach()} | {"d" + n: x.grad for n, x in tensors.items() if x is not None})
    for name, exact in results[0].items():
        plain, ours = results[1][name], results[2][name]
        if exact.is_complex():
            exact, plain, ours = map(torch.view_as_real, (exact, plain, ours))
        # dA sums products of many decays.
        assert_accurate(name, ours, exact, plain, relative=16 * EXP2_ERROR if device == "cuda" else 0.0)


def plain_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None,
):  # fmt: skip
    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    rank, dstate = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, 1)
    u, _ = plain_conv(x, conv1d_weight[:, 0], conv1d_bias, "silu")
    projected = u.transpose(1, 2) @ x_proj_weight.T
    delta = norm(projected[..., :rank] @ delta_proj_weight.T, dt_rms_weight).transpose(1, 2)

    def matrix(rows: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        rows = norm(rows if bias is None else rows + bias, weight)
        if A.is_complex():  # pairs, next to each other in the features, then in time
            rows = rows.unflatten(-1, (dstate, 2)).transpose(2, 3).flatten(1, 2)
        return rows.transpose(1, 2)

    width = dstate * (2 if A.is_complex() else 1)
    if B is None:
        B = matrix(projected[..., rank : rank + width], B_proj_bias, b_rms_weight)
    if C is None:
        C = matrix(projected[..., -width:], C_proj_bias, c_rms_weight)
    y, _ = plain_scan(u, delta, A, B, C, D, z, delta_bias, True)
    out = y.transpose(1, 2) @ out_proj_weight.T
    return out if out_proj_bias is None else out + out_proj_bias


def test_mamba_inner_with_biases_and_norms(device):
    batch, dim, length, dstate, rank = 2, 24, 15, 6, 4
    shapes = {
        "xz": (batch, 2 * dim, length),
        "conv1d_weight": (dim, 1, 4),
        "conv1d_bias": (dim,),
        "x_proj_weight": (rank + 2 * dstate, dim),
        "delta_proj_weight": (dim, rank),
        "out_proj_weight": (10, dim),
        "out_proj_bias": (10,),
        "A": (dim, dstate),
        "D": (dim,),
        "delta_bias": (dim,),
        "B_proj_bias": (dstate,),
        "C_proj_bias": (dstate,),
        "b_rms_weight": (dstate,),
        "c_rms_weight": (dstate,),
        "dt_rms_weight": (dim,),
    }

    def inputs() -> dict[str, Tensor]:
        tensors = {name: 0.5 * normal(*shape, seed=name, device=device) for name, shape in shapes.items()}
        return {name: leaf(-x.abs() if name == "A" else x) for name, x in tensors.items()}

    ours, theirs = inputs(), inputs()
    out, plain_out = compat.mamba_inner_fn(**ours), plain_inner(**theirs)
    assert_close("out", out, plain_out, 1e-5, 1e-5)
    out.square().sum().backward()
    plain_out.square().sum().backward()
    for name, x in ours.items():
        assert_close("d" + name, x.grad, theirs[name].grad, 1e-4, 1e-4)


# ---- seq_idx


def documents(length: int, batch: int, padding: bool, device: str) -> tuple[list[list[int]], Tensor]:
    """Lengths of the documents in each row, and seq_idx; with padding, each row ends with some."""
    generator = torch.Generator().manual_seed(length)
    rows, idx = [], []
    for _ in range(batch):
        used = length - int(torch.randint(1, length // 2, (1,), generator=generator)) if padding else length
        cuts = torch.randperm(used - 1, generator=generator)[: int(torch.randint(1, 5, (1,), generator=generator))] + 1
        edges = [0, *sorted(cuts.tolist()), used]
        rows.append([b - a for a, b in pairwise(edges)])
        numbers = [torch.full((n,), i) for i, n in enumerate(rows[-1])]
        idx.append(torch.cat([*numbers, torch.full((length - used,), -1)]))
    return rows, torch.stack(idx).int().to(device)


def by_documents(rows: list[list[int]], length: int, function) -> Tensor:
    """What function(row, first, end) gives for every document, with zeros for padding."""
    outs = []
    for i, lengths in enumerate(rows):
        edges = [sum(lengths[:j]) for j in range(len(lengths) + 1)]
        out = torch.cat([function(i, a, b) for a, b in pairwise(edges)], 2)
        outs.append(F.pad(out, (0, length - out.shape[2])))
    return torch.cat(outs)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("length", [8, 151, 372])
def test_scan_of_documents_in_rows(length, padding, device):
    case = Scan(length)
    rows, seq_idx = documents(length, 2, padding, device)
    ours, theirs = ({name: leaf(x) for name, x in case.inputs(device).items()} for _ in range(2))
    if padding:
        with torch.no_grad():
            ours["u"].transpose(1, 2)[seq_idx < 0] = math.nan
    out = compat.selective_scan_fn(**ours, delta_softplus=True, seq_idx=seq_idx)

    def alone(row: int, first: int, end: int) -> Tensor:
        tokens = {n: theirs[n][row : row + 1, :, first:end] for n in ("u", "delta", "B", "C", "z")}
        return plain_scan(**theirs | tokens, delta_softplus=True)[0]

    plain_out = by_documents(rows, length, alone)
    assert_close("out", out, plain_out, 6e-4, 2e-3)
    out.sum().backward()
    plain_out.sum().backward()
    for name, x in ours.items():
        assert_close("d" + name, x.grad, theirs[name].grad, 1e-3, 4e-3)


@itypes
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_conv_of_documents_in_rows(width, padding, itype, device):
    rtol, atol = {F32: (3e-4, 1e-3), F16: (3e-3, 5e-3), BF16: (1e-2, 5e-2)}[itype]
    for length, dim in ((8, 64), (151, 64), (784, 64)):
        rows, seq_idx = documents(length, 3, padding, device)
        x = normal(3, length, dim + 64, seed=f"x {length}", device=device, dtype=itype)[:, :, 32 : dim + 32]
        weight, bias = (normal(dim, *n, seed="w", device=device) for n in ((width,), ()))
        ours, theirs = ([leaf(t) for t in (x.transpose(1, 2), weight, bias)] for _ in range(2))
        if padding:
            with torch.no_grad():
                ours[0].transpose(1, 2)[seq_idx < 0] = math.nan
        out = compat.causal_conv1d_fn(*ours, seq_idx=seq_idx, activation="silu")
        plain_out = by_documents(
            rows,
            length,
            lambda i, a, b, t=theirs: plain_conv(t[0][i : i + 1, :, a:b], t[1], t[2], "silu")[0],
        )
        assert_close("out", out, plain_out, rtol, atol)
        seed = normal(*out.shape, seed="dout", device=device, dtype=itype)
        out.backward(seed)
        plain_out.backward(seed)
        assert_close("dx", ours[0].grad, theirs[0].grad, rtol, atol)
        for name, got, expected in zip(("dweight", "dbias"), ours[1:], theirs[1:], strict=True):
            assert_close(name, got.grad, expected.grad, 1e-3, 1e-3 if itype == F32 else atol)


# ---- causal_conv1d_fn

LENGTHS = [1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096]


@itypes
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize(
    ("channel_last", "initial", "final"),
    [(False, False, False), (True, False, False), (True, True, False), (True, False, True), (True, True, True)],
)
def test_causal_conv1d(channel_last, initial, final, width, itype, device):
    rtol, atol = {F32: (3e-4, 1e-3), F16: (3e-3, 5e-3), BF16: (1e-2, 5e-2)}[itype]
    for i, (length, dim) in enumerate([*((n, 64) for n in LENGTHS), (1, 4128), (130, 4128)]):
        has_bias, activation = i % 2 == 0, (None, "silu", "swish")[i % 3]
        x = normal(2, length, dim + 64, seed=f"x {length}", device=device, dtype=itype)[:, :, 32 : dim + 32]
        x = x.transpose(1, 2) if channel_last else x.transpose(1, 2).contiguous()
        weight, bias = (normal(dim, *n, seed="w", device=device) for n in ((width,), ()))
        states = normal(2, width - 1, dim, seed="s", device=device, dtype=itype).transpose(1, 2)
        names = ("x", "weight", "bias", "initial_states")
        given = (x, weight, bias if has_bias else None, states if initial else None)
        ours, theirs = ({n: leaf(t) for n, t in zip(names, given, strict=True)} for _ in range(2))
        out = compat.causal_conv1d_fn(**ours, return_final_states=final, activation=activation)
        plain_out, plain_final = plain_conv(**theirs, activation=activation)
        if final:
            out, final_states = out
            assert_same_bits("final_states", final_states, plain_final)
            out = out + torch.sigmoid(final_states).sum(2, keepdim=True)
            plain_out = plain_out + torch.sigmoid(plain_final).sum(2, keepdim=True)
        assert_close("out", out, plain_out, rtol, atol)
        seed = normal(*out.shape, seed="dout", device=device, dtype=itype)
        out.backward(seed)
        plain_out.backward(seed)
        for name, t in ours.items():
            if t is not None:
                weights = name in ("weight", "bias")
                limits = (1e-3, 1e-3 if itype == F32 else atol) if weights else (rtol, atol)
                assert_close(f"d{name}, length {length}", t.grad, theirs[name].grad, *limits)


def test_final_states_go_where_they_are_wanted(device):
    x, weight = normal(2, 5, 9, seed="x", device=device), normal(5, 4, seed="w", device=device)
    where = torch.empty(2, 3, 5, device=device).transpose(1, 2)
    _, final = compat.causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=where)
    assert final is where
    assert_same_bits("final", final.contiguous(), x[:, :, -3:].contiguous())


# ---- updates


@itypes
@pytest.mark.parametrize("slots", ["own", "gathered", "skipped"])
@pytest.mark.parametrize("ring", [False, True], ids=["shifted", "ring"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_causal_conv1d_update(width, ring, slots, itype, device):
    rtol, atol = {F32: (3e-4, 1e-3), F16: (3e-3, 5e-3), BF16: (1e-2, 5e-2)}[itype]
    batch = 64
    for i, (length, dim) in enumerate(product([1, 4, 5], [256, 256 + 16])):
        places = (width - 1, width + 2, width + 9)[(i + width) % 3]
        generator = torch.Generator().manual_seed(i)
        pool = batch if slots == "own" else 3 * batch
        state = normal(pool, places, dim, seed=f"state {i}", device=device, dtype=itype).transpose(1, 2)
        state = state.clone(memory_format=torch.contiguous_format if i % 2 else torch.preserve_format)
        indices = torch.randperm(pool, generator=generator)[:batch].int().to(device)
        if slots == "skipped":
            indices[::3] = -1
        x = normal(batch, length, dim, seed="x", device=device, dtype=itype).transpose(1, 2)
        weight, bias = (normal(dim, *n, seed="w", device=device) for n in ((width,), ()))
        seqlens = torch.randint(0, 1024, (batch,), generator=generator, dtype=torch.int32).to(device) if ring else None
        expected, untouched = torch.zeros_like(x), torch.ones(pool, dtype=torch.bool, device=device)
        final = state.clone()
        for j in range(batch):
            slot = j if slots == "own" else int(indices[j])
            if slot < 0:
                continue
            untouched[slot] = False
            first = int(seqlens[j]) if ring else places
            window = [state[slot, :, (first - k) % places] for k in range(width - 1, 0, -1)]
            expected[j] = plain_conv(x[j : j + 1], weight, bias, "silu", torch.stack(window, 1)[None])[0]
            for t in range(length):
                if ring:
                    final[slot, :, (first + t) % places] = x[j, :, t]
            if not ring:
                final[slot] = torch.cat([state[slot], x[j]], 1)[:, -places:]
        single = length == 1 and i % 2 == 0
        out = compat.causal_conv1d_update(
            x[:, :, 0] if single else x,
            state,
            weight,
            bias,
            activation="silu",
            cache_seqlens=seqlens,
            conv_state_indices=None if slots == "own" else indices,
        )
        assert_close("out", out[:, :, None] if single else out, expected, rtol, atol)
        assert_same_bits("conv_state", state.contiguous(), final.contiguous())


def plain_update(state, x, dt, A, B, C, D, z, dt_bias):
    """Out and the new state, with heads."""
    heads = x.shape[1] // B.shape[1]
    B, C = (matrix.repeat_interleave(heads, 1)[:, :, None] for matrix in (B, C))
    delta = F.softplus(dt.float() + dt_bias)[..., None]
    state = torch.exp(delta * A) * state.float() + delta * B * x.float()[..., None]
    y = (state * C).sum(-1) + D * x.float()
    return y if z is None else y * F.silu(z.float()), state


@itypes
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("dstate", [16, 32, 64])
@pytest.mark.parametrize("slots", ["own", "gathered", "skipped"])
def test_selective_state_update(slots, dstate, has_z, itype, device):
    rtol, atol = {F32: (3e-4, 1e-3), F16: (5e-3, 1e-2), BF16: (1e-2 if slots == "own" else 6e-2, 6e-2)}[itype]
    batch = 2 if slots == "own" else 16
    for dim in (2048, 2048 + 16, 4096) if slots == "own" else (2048 + 16,):
        pool = batch if slots == "own" else 2 * batch
        state = normal(pool, dim, dstate, seed="state", device=device, dtype=itype).clone()
        x, dt, z = (normal(batch, dim, seed=n, device=device, dtype=itype) for n in ("x", "dt", "z"))
        A = -uniform(dim, dstate, seed="A", device=device) - 1
        B, C = (normal(batch, dstate, seed=n, device=device) for n in ("B", "C"))
        D, bias = normal(dim, seed="D", device=device), uniform(dim, seed="bias", device=device) - 4
        indices = torch.randperm(pool, generator=torch.Generator().manual_seed(0))[:batch].int().to(device)
        if slots == "skipped":
            indices[: batch // 2] = -1
        where = torch.arange(batch, device=device) if slots == "own" else indices.long()
        z = z if has_z else None
        plain_out, plain_state = plain_update(
            *(state[where, None], x[:, None], dt[:, None], A, B[:, None], C[:, None], D),
            *(None if z is None else z[:, None], bias),
        )
        before = state.clone()
        out = compat.selective_state_update(
            *(state, x, dt, A, B, C),
            **{"D": D, "z": z, "dt_bias": bias, "dt_softplus": True},
            state_batch_indices=None if slots == "own" else indices,
        )
        assert out.dtype == itype
        used = where >= 0
        assert not out[~used].any()
        assert_close("out", out[used], plain_out[used, 0], rtol, atol)
        assert_close("state", state[where[used]], plain_state[used, 0], rtol, atol)
        before[where[used]] = state[where[used]]
        assert_same_bits("other slots", state, before)


@itypes
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dstate", [16, 64])
def test_selective_state_update_with_heads(dstate, groups, tied, has_z, itype, device):
    rtol, atol = {F32: (3e-4, 1e-3), F16: (5e-3, 3e-2), BF16: (1e-2, 1e-1)}[itype]
    batch, heads, dim = 2, 32, 64
    state = normal(batch, heads, dim, dstate, seed="state", device=device, dtype=itype).clone()
    x, z = (normal(batch, heads, dim, seed=n, device=device, dtype=itype) for n in ("x", "z"))
    each = [] if tied else [dim]
    dt = normal(batch, heads, *each, seed="dt", device=device, dtype=itype)
    bias = uniform(heads, *each, seed="bias", device=device) - 4
    A = -uniform(heads, *each, *(each and [dstate]), seed="A", device=device) - 1
    D = normal(heads, *each, seed="D", device=device)
    if tied:
        dt, bias, D = (t[..., None].expand(*t.shape, dim) for t in (dt, bias, D))
        A = A[:, None, None].expand(heads, dim, dstate)
    B, C = (normal(batch, groups, dstate, seed=n, device=device) for n in ("B", "C"))
    z = z if has_z else None
    plain_out, plain_state = plain_update(state, x, dt, A, B, C, D, z, bias)
    out = compat.selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True)
    assert_close("out", out, plain_out, rtol, atol)
    assert_close("state", state, plain_state, rtol, atol)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_all_slots_may_be_skipped(dtype, device):
    state = normal(3, 4, 8, seed="state", device=device, dtype=dtype).clone()
    conv = normal(3, 4, 5, seed="conv", device=device, dtype=dtype).clone()
    before = state.clone(), conv.clone()
    x, matrix = normal(2, 4, seed="x", device=device, dtype=dtype), normal(2, 8, seed="B", device=device, dtype=dtype)
    nowhere = torch.tensor([-1, -1], dtype=torch.int32, device=device)
    A, weight = -torch.ones(4, 8, device=device), torch.ones(4, 3, device=device)
    out = compat.selective_state_update(state, x, x, A, matrix, matrix, state_batch_indices=nowhere)
    conv_out = compat.causal_conv1d_update(x, conv, weight, conv_state_indices=nowhere)
    assert not out.any()
    assert not conv_out.any()
    assert_same_bits("state", state, before[0])
    assert_same_bits("conv_state", conv, before[1])


# ---- bad input


def test_bad_input_is_named():
    x, A, B = torch.zeros(2, 4, 6), torch.zeros(4, 8), torch.zeros(2, 8, 6)
    idx, weight = torch.zeros(2, 6, dtype=torch.int32), torch.zeros(4, 3)
    inner = {"conv1d_weight": weight[:, None], "conv1d_bias": None, "delta_proj_weight": torch.zeros(4, 3)}
    inner |= {"x_proj_weight": torch.zeros(20, 4), "out_proj_weight": torch.zeros(5, 4), "out_proj_bias": None}
    for message, call in {
        r"selective_scan_fn: u must be \(batch, dim, length\), got \(4, 6\)": lambda: compat.selective_scan_fn(
            x[0], x[0], A, B, B
        ),
        r"selective_scan_fn: B and C must be .* 1 \* 6 .* got \(2, 8, 5\)": lambda: compat.selective_scan_fn(
            x, x, A, B[:, :, :5], B
        ),
        r"selective_scan_fn: B and C must be .* 2 \* 6 .* got \(2, 8, 6\)": lambda: compat.selective_scan_fn(
            x, x, A.to(C64), B, B
        ),
        "selective_scan_fn: return_last_state must be False": lambda: compat.selective_scan_fn(
            x, x, A, B, B, return_last_state=True, seq_idx=idx
        ),
        r"selective_scan_fn: seq_idx must be integers \(2, 6\)": lambda: compat.selective_scan_fn(
            x, x, A, B, B, seq_idx=idx[:, :5]
        ),
        r"mamba_inner_fn: x_proj_weight must have 3 \+ 8 \+ 8 rows, got 20": lambda: compat.mamba_inner_fn(
            torch.zeros(2, 8, 6), A=A, **inner
        ),
        r"mamba_inner_fn: xz must be \(batch, 2 \* dim, length\)": lambda: compat.mamba_inner_fn(
            torch.zeros(2, 7, 6), A=A, **inner
        ),
        "causal_conv1d_fn: with seq_idx, initial_states": lambda: compat.causal_conv1d_fn(
            x, weight, seq_idx=idx, return_final_states=True
        ),
        'causal_conv1d_fn: activation must be None, "silu" or "swish", got \'relu\'': lambda: compat.causal_conv1d_fn(
            x, weight, activation="relu"
        ),
        r"causal_conv1d_update: .* at least 2\), got \(2, 4, 6\) and \(2, 4, 1\)": lambda: compat.causal_conv1d_update(
            x, torch.zeros(2, 4, 1), weight
        ),
        r"selective_state_update: state must be .* got \(2, 4, 8\), \(2, 5\)": lambda: compat.selective_state_update(
            torch.zeros(2, 4, 8), torch.zeros(2, 5), torch.zeros(2, 5), A, B[:, :, 0], B[:, :, 0]
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
