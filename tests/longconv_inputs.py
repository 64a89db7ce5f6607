"""Tensors for the filters' and the long convolution's cases."""

import math

import torch
from longconv_cases import ConvCase, FilterCase
from operators import statistics
from tensors import Draw, Tensors
from torch import Tensor


def uniform(draw: Draw, *shape: int) -> Tensor:
    """From 0 to 1, in float64."""
    return torch.rand(shape, generator=draw.generator, device=draw.device, dtype=torch.float64)


def decaying(draw: Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    """Logarithms of discrete modes: memories of 1 to 10,000 steps, any phase."""
    return torch.complex(-(10 ** (-4 * uniform(draw, *shape))), math.pi * (2 * uniform(draw, *shape) - 1)).to(dtype)


def s4_parameters(
    draw: Draw, channels: int, poles: int, rank: int, dtype: torch.dtype, filters: int | None = None
) -> Tensors:
    """As HiPPO-LegS has them: poles on a line left of zero, P and B that grow with the frequency."""
    n = torch.arange(poles, device=draw.device, dtype=torch.float64).expand(channels, poles)
    noise = 1 + 0.1 * torch.randn(channels, poles, generator=draw.generator, device=draw.device, dtype=torch.float64)
    tensors = {
        "w": torch.complex(-0.5 * noise.abs(), math.pi * n * noise).to(dtype),
        "B": torch.complex(((2 * n + 1) / 2).sqrt() * noise, 0.1 * n).to(dtype),
        "C": draw(*(() if filters is None else (filters,)), channels, poles, dtype=dtype),
        "dt": (10 ** (-3 + 2 * uniform(draw, channels))).to(dtype.to_real()),
    }
    if rank:
        P = draw(rank, channels, poles, dtype=dtype)
        tensors["P"] = (P * ((n + 0.5) / 2).sqrt()).to(dtype)
    return tensors


def filter_inputs(case: FilterCase, device: str) -> tuple[Tensors, Tensor]:
    """The tensors and the output's gradient."""
    draw, dtype, rows = Draw(case, device), case.dtype, (case.groups, case.rows)
    if case.operator.startswith("cauchy"):
        tensors = {
            "v": draw(*rows, case.poles, dtype=dtype),
            "w": decaying(draw, case.rows, case.poles, dtype=dtype) - 0.1,
            "z": torch.complex(0 * uniform(draw, case.length), 8 * uniform(draw, case.length) - 4).to(dtype),
        }
        return tensors, draw(*rows, case.length, dtype=dtype)
    if case.operator == "s4_spectrum":
        tensors = s4_parameters(draw, case.rows, case.poles, case.rank, dtype, case.groups)
        return tensors, draw(*rows, case.length // 2 + 1, dtype=dtype)
    tensors = {"x": decaying(draw, case.rows, case.poles, dtype=dtype)}
    if case.operator == "vandermonde_transpose":
        tensors["u"] = draw(*rows, case.length, dtype=dtype.to_real() if case.real else dtype)
        return tensors, draw(*rows, case.poles, dtype=dtype)
    tensors["v"] = draw(*rows, case.poles, dtype=dtype)
    return tensors, draw(*rows, case.length, dtype=dtype.to_real() if case.operator.endswith("conj") else dtype)


def conv_inputs(case: ConvCase, device: str) -> tuple[Tensors, Tensors, dict]:
    """Differentiable tensors, the output's gradient, and the options."""
    draw = Draw(case, device)
    total, channels, parameter = sum(case.lengths), case.channels, statistics(case.dtype)
    tensors = {"u": draw(total, channels, dtype=case.dtype), "k": draw(channels, case.taps, dtype=parameter)}
    if case.D:
        tensors["D"] = draw(channels, dtype=parameter)
    for name, on in (("pre_gate", case.pre_gate), ("gate", case.gate)):
        if on:
            tensors[name] = draw(total, channels, dtype=case.dtype)
    if case.taps_after:
        tensors["k_after"] = draw(channels, case.taps_after, dtype=parameter)
    return tensors, {"out": draw(total, channels, dtype=case.dtype)}, {"reverse": case.reverse}
