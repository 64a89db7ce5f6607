"""packseq.s4_step: equal to the dense recurrence, to the convolution with the filters that it stands for, and a
continuation of either. Its pools of states are in test_scan_steps.py."""

from functools import partial

import longconv_reference as reference
import packseq
import pytest
import torch
from bad_input import assert_raises, zeros
from compare import assert_accurate, assert_same_bits
from longconv_cases import ConvCase
from longconv_inputs import s4_parameters
from operators import boundaries, statistics
from packseq.nn import hippo
from tensors import Draw, Tensors, every_other, exact_of, real, transposed
from torch import Tensor

F32, BF16, F16, F64, C64, C128 = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.complex64, torch.complex128),
)


def model(device: str, channels: int, poles: int, rank: int, filters: int | None, dtype: torch.dtype) -> Tensors:
    """S4's parameters, stable with P too: at most the size of HiPPO-LegS's own."""
    draw = Draw(ConvCase(f"model {channels} {poles} {rank} {filters}", (1,), 1, dtype), device)
    return s4_parameters(draw, channels, poles, rank, statistics(dtype).to_complex(), filters)


# ---- what it computes


@pytest.mark.parametrize("lengths", [(1,) * 7, (3, 1, 0, 20, 1), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize(("rank", "discretization"), [(0, "zoh"), (0, "bilinear"), (1, "bilinear"), (2, "bilinear")])
@pytest.mark.parametrize(("poles", "filters"), [(1, None), (7, 1), (64, 3)])
def test_steps_are_the_dense_recurrence(device, poles, filters, rank, discretization, dtype, lengths):
    if device == "cuda" and dtype == F64:
        pytest.skip("a GPU takes no float64")
    parameters = model(device, 3, poles, rank, filters, dtype)
    draw = Draw(ConvCase("inputs", lengths, 1, dtype), device)
    u, states = draw(sum(lengths), 3, dtype=dtype), draw(len(lengths), 3, poles, dtype=parameters["w"].dtype)
    parameters["D"] = draw(*parameters["C"].shape[:-1], dtype=parameters["dt"].dtype)
    pool = states.clone()
    out = packseq.s4_step(pool, u, **parameters, cu_seqlens=boundaries(lengths, device), discretization=discretization)
    step = partial(reference.s4_step, lengths=lengths, zoh=discretization == "zoh")
    plain, exact = step(states, u, **parameters), step(states.to(C128), u.double(), **exact_of(parameters))
    assert out.shape == (sum(lengths), *parameters["C"].shape[:-1])
    assert_accurate("out", out, exact[0], plain[0])
    assert_accurate("states", real(pool), real(exact[1]), real(plain[1]))


def test_an_integrator_by_zero_order_hold(device):
    """w = 0, where (Abar - 1) / w has only a limit."""
    w = torch.zeros(1, 2, dtype=C64, device=device)
    w[0, 1] = -1e-9
    ones, dt = torch.ones_like(w), torch.full((1,), 0.5, device=device)
    pool = torch.zeros(1, 1, 2, dtype=C64, device=device)
    cu = boundaries([3], device)
    out = packseq.s4_step(pool, torch.ones(3, 1, device=device), w, ones, ones, dt, cu, discretization="zoh")
    torch.testing.assert_close(out[:, 0].cpu(), torch.tensor([2.0, 4, 6]))


def legs(device: str, channels: int, pairs: int) -> Tensors:
    """HiPPO-LegS as its normal part and a rank-one correction."""
    form = hippo.diagonal_plus_low_rank("legs", 2 * pairs)
    parameters = {
        "w": form.w.expand(channels, pairs),
        "P": form.P[:, None].expand(1, channels, pairs),
        "B": form.B.expand(channels, pairs),
        "C": torch.randn(channels, pairs, dtype=C128, generator=torch.Generator().manual_seed(0)),
        "dt": torch.logspace(-3, -1, channels, dtype=F64),
    }
    return {name: x.to(device, C64 if x.is_complex() else F32) for name, x in parameters.items()}


LONG = 16_384


def test_recurrence_and_convolution_agree_over_16_384_steps(device):
    parameters = legs(device, 4, 32)
    wide = exact_of(parameters)
    Abar, _ = reference.dense_model(wide["w"], wide["B"], wide["dt"], wide["P"])
    of_filter = parameters | {"C": reference.c_tilde(Abar, wide["C"], LONG).to(C64)}
    u = torch.randn(LONG, 4, generator=torch.Generator().manual_seed(1)).to(device)
    convolved = packseq.long_conv(u, packseq.s4_filter(**of_filter, length=LONG))
    pool = torch.zeros(1, 4, 32, dtype=C64, device=device)
    stepped = packseq.s4_step(pool, u, **parameters, cu_seqlens=boundaries([LONG], device))
    torch.testing.assert_close(stepped, convolved, rtol=0, atol=1e-4 * convolved.abs().max().item())


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_a_prefix_is_convolved_and_then_continued(device, discretization):
    """Several sequences: the convolution's final states are the pool, and token by token it goes on."""
    parameters = legs(device, 3, 8)
    A, B, C, dt = (parameters[name] for name in ("w", "B", "C", "dt"))
    lengths, more = [200, 1, 0, 700], 20
    draw = Draw(ConvCase("prefix", (1,), 1, F32), device)
    whole = [draw(n + more, 3, dtype=F32) for n in lengths]
    k = packseq.s4d_filter(A, B, C, dt, 720, discretization=discretization)
    expected = [packseq.long_conv(u, k) for u in whole]

    modes = (*packseq.s4d_modes(A, B, dt, discretization=discretization), C)
    prefix = torch.cat([u[:n] for u, n in zip(whole, lengths, strict=True)])
    out, pool = packseq.long_conv(prefix, k, boundaries(lengths, device), modes=modes, return_final_states=True)
    for got, right in zip(out.split(lengths), expected, strict=True):
        torch.testing.assert_close(got, right[: len(got)], rtol=0, atol=1e-4 * right.abs().max().item())
    for t in range(more):
        u = torch.stack([u[n + t] for u, n in zip(whole, lengths, strict=True)])
        out = packseq.s4_step(pool, u, A, B, C, dt, discretization=discretization)
        right = torch.stack([x[n + t] for x, n in zip(expected, lengths, strict=True)])
        torch.testing.assert_close(out, right, rtol=0, atol=1e-4 * max(x.abs().max().item() for x in expected))


def test_a_prefix_is_stepped_at_once_and_then_continued(device):
    parameters = legs(device, 3, 8)
    u = torch.randn(60, 3, generator=torch.Generator().manual_seed(2)).to(device)
    whole, pool = (torch.zeros(1, 3, 8, dtype=C64, device=device) for _ in range(2))
    expected = packseq.s4_step(whole, u, **parameters, cu_seqlens=boundaries([60], device))
    outs = [packseq.s4_step(pool, u[:40], **parameters, cu_seqlens=boundaries([40], device))]
    outs += [packseq.s4_step(pool, u[t : t + 1], **parameters) for t in range(40, 60)]
    torch.testing.assert_close(torch.cat(outs), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(pool, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def test_filters_share_the_state(device):
    parameters = model(device, 3, 5, 1, 4, F32)
    u = torch.randn(6, 3, device=device)
    pool = torch.zeros(1, 3, 5, dtype=C64, device=device)
    out = packseq.s4_step(pool, u, **parameters, cu_seqlens=boundaries([6], device))
    for f in range(4):
        one = torch.zeros_like(pool)
        alone = packseq.s4_step(one, u, **parameters | {"C": parameters["C"][f]}, cu_seqlens=boundaries([6], device))
        torch.testing.assert_close(alone, out[:, f], rtol=1e-5, atol=1e-5 * out.abs().max().item())
        assert_same_bits("states", real(one), real(pool))


# ---- layouts


def test_strides_and_lazy_conjugates_change_nothing(device):
    parameters = model(device, 6, 4, 2, 3, F32)
    u = torch.randn(5, 6, device=device)
    pools = [torch.ones(5, 6, 4, dtype=C64, device=device) for _ in range(2)]
    expected = packseq.s4_step(pools[0], u, **parameters)
    odd = {name: every_other(x) for name, x in parameters.items()}
    odd["B"], odd["C"] = (parameters[name].conj().resolve_conj().conj() for name in ("B", "C"))
    assert_same_bits("out", packseq.s4_step(pools[1], transposed(u), **odd), expected)
    assert_same_bits("pool", real(pools[1]), real(pools[0]))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_half_parameters_are_widened(device, dtype):
    parameters, u = model(device, 6, 4, 1, None, F32), torch.randn(4, 6, device=device).to(dtype)
    wide = parameters | {"dt": torch.full((6,), 0.25, device=device), "D": torch.ones(6, device=device)}
    pools = [torch.ones(4, 6, 4, dtype=C64, device=device) for _ in range(2)]
    expected = packseq.s4_step(pools[0], u, **wide)
    half = wide | {name: wide[name].to(dtype) for name in ("dt", "D")}
    assert_same_bits("out", packseq.s4_step(pools[1], u, **half), expected)
    assert_same_bits("pool", real(pools[1]), real(pools[0]))


# ---- bad input


def good(device: str) -> dict:
    of = partial(torch.full, dtype=C64, device=device)
    return {
        "states": of((9, 3, 4), 0),
        "u": torch.zeros(6, 3, device=device),
        "w": of((3, 4), -1),
        "B": of((3, 4), 1),
        "C": of((3, 4), 1),
        "dt": torch.ones(3, device=device),
        "cu_seqlens": boundaries([2, 4], device),
        "P": of((1, 3, 4), 1),
    }


def indices(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


BAD = {
    "u-is-flat": ({"u": lambda x: x.flatten()}, r"u must be \[total, channels\], got shape \[18\]"),
    "u-is-a-scalar": ({"u": lambda x: x[0, 0], "cu_seqlens": None}, r"u must be \[total, channels\], got shape \[\]"),
    "u-is-int": ({"u": lambda x: x.int()}, "u must be float16, bfloat16, float32 or float64, got int32"),
    "w-is-flat": ({"w": lambda x: x.flatten()}, r"w must be \[channels, poles\], got shape \[12\]"),
    "w-channels": ({"w": lambda x: x[:2]}, r"w must have shape \[3, 4\], got \[2, 4\]"),
    "w-has-no-poles": ({"w": lambda x: x[:, :0]}, "w must have between 1 and 1024 poles, got 0"),
    "w-is-wide": ({"w": zeros(3, 1025, dtype=C64)}, "w must have between 1 and 1024 poles, got 1025"),
    "w-is-real": ({"w": lambda x: x.real}, "w must be complex64, got float32"),
    "B-poles": ({"B": lambda x: x[:, :3]}, r"B must have shape \[3, 4\], got \[3, 3\]"),
    "B-is-wide": ({"B": lambda x: x.to(C128)}, "B must be complex64, got complex128"),
    "C-is-flat": ({"C": lambda x: x.flatten()}, r"C must be \[channels, poles\] or \[filters, channels, poles\], got"),
    "C-channels": ({"C": zeros(2, 2, 4, dtype=C64)}, r"C must have shape \[2, 3, 4\], got \[2, 2, 4\]"),
    "C-has-no-filters": ({"C": zeros(0, 3, 4, dtype=C64)}, "C must have at least 1 filter, got 0"),
    "dt-shape": ({"dt": lambda x: x[:2]}, r"dt must have shape \[3\], got \[2\]"),
    "dt-is-double": ({"dt": lambda x: x.double()}, "dt must be float32, got float64"),
    "P-is-flat": ({"P": lambda x: x[0]}, r"P must be \[rank, channels, poles\], got shape \[3, 4\]"),
    "P-rank": ({"P": zeros(3, 3, 4, dtype=C64)}, "P must have rank 1 or 2, got 3"),
    "P-poles": ({"P": lambda x: x[..., :2]}, r"P must have shape \[1, 3, 4\], got \[1, 3, 2\]"),
    "P-with-zoh": ({"discretization": "zoh"}, "P must be None where the discretization is zoh, got rank 1"),
    "D-shape": ({"D": zeros(2, 3)}, r"D must have shape \[3\], got \[2, 3\]"),
    "D-filters": (
        {"C": zeros(2, 3, 4, dtype=C64), "D": zeros(3)},
        r"D must have shape \[2, 3\], got \[3\]",
    ),
    "D-is-double": ({"D": zeros(3, dtype=F64)}, "D must be float32, got float64"),
    "discretization": ({"discretization": "euler"}, 'discretization must be "bilinear" or "zoh", got \'euler\''),
    "cu-is-long": ({"cu_seqlens": lambda x: x.long()}, "cu_seqlens must be int32, got int64"),
    "cu-values": ({"cu_seqlens": lambda x: x + 1}, "cu_seqlens must start at 0, got 1"),
    "states-are-flat": ({"states": zeros(9, 4)}, r"states must be \[slots, channels, poles\], got shape \[9, 4\]"),
    "states-poles": ({"states": zeros(9, 3, 1, dtype=C64)}, r"states must have shape \[9, 3, 4\], got \[9, 3, 1\]"),
    "states-are-real": ({"states": zeros(9, 3, 4)}, "states must be complex64 like w, got float32"),
    "states-strides": (
        {"states": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)},
        "states must be contiguous, got",
    ),
    "too-few-states": (
        {"states": lambda x: x[:1]},
        "states must have a slot for each .*, or indices must be given",
    ),
    "indices-shape": ({"indices": lambda x: indices(x.device, 0, 1, 2)}, r"indices must have shape \[2\]"),
    "indices-are-long": (
        {"indices": lambda x: indices(x.device, 0, 1).long()},
        "indices must be int32, got",
    ),
    "indices-outside": (
        {"indices": lambda x: indices(x.device, 0, 9)},
        "indices must be negative or one of the 9 slots of states, got 9 at position 1",
    ),
    "indices-twice": (
        {"indices": lambda x: indices(x.device, 7, 7)},
        "indices must give each sequence a slot of its own, got 7 again at position 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(device, name, monkeypatch):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    changes, message = BAD[name]
    assert_raises(packseq.s4_step, good(device), changes, f"s4_step: {message}")


@pytest.mark.gpu
def test_what_only_a_gpu_refuses():
    arguments = good("cuda")
    for name in ("states", "w", "B", "C", "dt", "P", "cu_seqlens"):
        with pytest.raises(ValueError, match=f"{name} must be on cuda:0 like u, got cpu"):
            packseq.s4_step(**arguments | {name: arguments[name].cpu()})
    wide = {name: x.to(C128) if x.is_complex() else x.double() for name, x in arguments.items() if name != "cu_seqlens"}
    with pytest.raises(ValueError, match="u must be float16, bfloat16 or float32 on a GPU, got float64"):
        packseq.s4_step(**wide, cu_seqlens=arguments["cu_seqlens"])
