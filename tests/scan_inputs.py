"""Tensors for the scan's and the convolution's cases."""

import torch
from operators import statistics
from scan_cases import ConvCase, ScanCase
from tensors import Draw, Tensors


def scan_inputs(case: ScanCase, device: str) -> tuple[Tensors, Tensors, dict]:
    """Differentiable tensors, the outputs' gradients, and the options."""
    draw = Draw(case, device)
    total, n, channels, states = sum(case.lengths), len(case.lengths), case.channels, case.states
    parameter = statistics(case.dtype)
    state = parameter.to_complex() if case.complex else parameter
    matrix = state if case.complex else case.dtype
    A = -draw(channels, states, dtype=parameter).exp()
    tensors = {
        "u": draw(total, channels, dtype=case.dtype),
        "delta": draw(total, channels, dtype=case.dtype),
        "A": torch.complex(A, 2 * draw(channels, states, dtype=parameter)) if case.complex else A,
    }
    if not case.delta_softplus:
        tensors["delta"] = tensors["delta"].abs() / 2
    for name in ("B", "C"):
        constant = name in case.constant
        shape = (channels, states) if constant else (total, case.groups, states)
        tensors[name] = draw(*shape, dtype=state if constant else matrix)
    if case.D:
        tensors["D"] = draw(channels, dtype=parameter)
    if case.z:
        tensors["z"] = draw(total, channels, dtype=case.dtype)
    if case.delta_bias:
        tensors["delta_bias"] = draw(channels, dtype=parameter).abs() / 4
    if case.initial_states:
        tensors["initial_states"] = draw(n, channels, states, dtype=state)
    gradients = {
        "out": draw(total, channels, dtype=case.dtype),
        "final_states": draw(n, channels, states, dtype=state),
    }
    return tensors, gradients, {"delta_softplus": case.delta_softplus, "reverse": case.reverse}


def conv_inputs(case: ConvCase, device: str) -> tuple[Tensors, Tensors, dict]:
    draw = Draw(case, device)
    total, channels, parameter = sum(case.lengths), case.channels, statistics(case.dtype)
    states = (len(case.lengths), channels, case.width - 1)
    tensors = {
        "x": draw(total, channels, dtype=case.dtype),
        "weight": draw(channels, case.width, dtype=parameter),
    }
    if case.bias:
        tensors["bias"] = draw(channels, dtype=parameter)
    if case.initial_states:
        tensors["initial_states"] = draw(*states, dtype=case.dtype)
    gradients = {"out": draw(total, channels, dtype=case.dtype), "final_states": draw(*states, dtype=case.dtype)}
    return tensors, gradients, {"activation": "silu" if case.silu else None, "reverse": case.reverse}
