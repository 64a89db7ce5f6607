"""packseq.compat.mamba_ssm: selective_scan_fn and mamba_inner_fn on the test grids of mamba-ssm, its shapes,
dtypes and tolerances; and what its tests leave out: gradients through states, constant and complex matrices in half
types, padding. And bad input of all the functions, of which others are in test_compat_*.py.
"""

import math
from dataclasses import dataclass
from itertools import product

import packseq.compat.mamba_ssm as compat
import pytest
import torch
from compare import EXP2_ERROR, assert_accurate
from compat_formulas import assert_close, by_documents, documents, leaf, normal, plain_conv, plain_scan, uniform
from torch import Tensor

F32, F16, BF16, C64 = torch.float32, torch.float16, torch.bfloat16, torch.complex64

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
