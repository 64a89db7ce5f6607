"""What packseq.selective_scan, packseq.causal_conv1d and their steps say of bad input."""

import packseq
import pytest
import torch
from bad_input import assert_raises, bad_boundaries, zeros
from operators import boundaries

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def good_scan(device: str) -> dict:
    return {
        "u": torch.zeros(6, 4, device=device),
        "delta": torch.zeros(6, 4, device=device),
        "A": torch.zeros(4, 3, device=device),
        "B": torch.zeros(6, 2, 3, device=device),
        "C": torch.zeros(6, 2, 3, device=device),
        "cu_seqlens": boundaries([2, 4], device),
    }


def good_conv(device: str) -> dict:
    return {
        "x": torch.zeros(6, 4, device=device),
        "weight": torch.zeros(4, 3, device=device),
        "cu_seqlens": boundaries([2, 4], device),
    }


BAD_SCAN = {
    "u-is-flat": ({"u": lambda x: x.flatten()}, r"u must be \[total, channels\], got shape \[24\]"),
    "u-is-a-scalar": ({"u": lambda x: x[0, 0], "cu_seqlens": None}, r"u must be \[total, channels\], got shape \[\]"),
    "u-is-int": ({"u": lambda x: x.int()}, "u must be float16, bfloat16, float32 or float64, got int32"),
    "u-has-no-channels": ({"u": lambda x: x[:, :0]}, r"u must have between 1 and 2\^31 - 1 channels, got 0"),
    "delta-rows": ({"delta": lambda x: x[:5]}, r"delta must have shape \[6, 4\], got \[5, 4\]"),
    "delta-is-half": ({"delta": lambda x: x.half()}, "delta must be float32 like u, got float16"),
    "A-is-flat": ({"A": lambda x: x.flatten()}, r"A must be \[channels, states\], got shape \[12\]"),
    "A-channels": ({"A": lambda x: x[:3]}, r"A must have shape \[4, 3\], got \[3, 3\]"),
    "A-has-no-states": ({"A": lambda x: x[:, :0]}, "A must have between 1 and 256 states, got 0"),
    "A-is-wide": ({"A": zeros(4, 257)}, "A must have between 1 and 256 states, got 257"),
    "A-is-half": ({"A": lambda x: x.half()}, "A must be float32 or complex64, got float16"),
    "A-is-double": ({"A": lambda x: x.double()}, "A must be float32 or complex64, got float64"),
    "B-is-flat": (
        {"B": lambda x: x.flatten()},
        r"B must be \[total, groups, states\] or \[channels, states\], got shape \[36\]",
    ),
    "B-rows": ({"B": lambda x: x[:5]}, r"B must have shape \[6, 2, 3\], got \[5, 2, 3\]"),
    "B-states": ({"B": lambda x: x[..., :2]}, r"B must have shape \[6, 2, 3\], got \[6, 2, 2\]"),
    "B-groups": ({"B": zeros(6, 3, 3)}, "B must have a number of groups that divides u's 4 channels, got 3"),
    "B-has-no-groups": ({"B": zeros(6, 0, 3)}, "B must have a number of groups that divides u's 4 channels, got 0"),
    "B-is-half": ({"B": lambda x: x.half()}, "B must be float32 like u, got float16"),
    "B-is-complex": ({"B": lambda x: x.cfloat()}, "B must be float32 like u, got complex64"),
    "B-is-real": ({"A": lambda x: x.cfloat()}, "B must be complex64 like A, got float32"),
    "constant-B-channels": ({"B": zeros(3, 3)}, r"B must have shape \[4, 3\], got \[3, 3\]"),
    "constant-B-is-half": ({"B": zeros(4, 3, dtype=torch.float16)}, "B must be float32 like A, got float16"),
    "C-groups": ({"C": zeros(6, 1, 3)}, r"C must have shape \[6, 2, 3\], got \[6, 1, 3\]"),
    "cu-is-long": ({"cu_seqlens": lambda x: x.long()}, "cu_seqlens must be int32, got int64"),
    "D-shape": ({"D": zeros(4, 1)}, r"D must have shape \[4\], got \[4, 1\]"),
    "D-is-half": ({"D": zeros(4, dtype=torch.float16)}, "D must be float32, got float16"),
    "z-shape": ({"z": zeros(6, 1)}, r"z must have shape \[6, 4\], got \[6, 1\]"),
    "z-is-half": ({"z": zeros(6, 4, dtype=torch.float16)}, "z must be float32 like u, got float16"),
    "bias-shape": ({"delta_bias": zeros(1)}, r"delta_bias must have shape \[4\], got \[1\]"),
    "bias-is-half": ({"delta_bias": zeros(4, dtype=BF16)}, "delta_bias must be float32, got bfloat16"),
}
BAD_CONV = {
    "x-is-flat": ({"x": lambda x: x.flatten()}, r"x must be \[total, channels\], got shape \[24\]"),
    "x-is-int": ({"x": lambda x: x.int()}, "x must be float16, bfloat16, float32 or float64, got int32"),
    "x-has-no-channels": ({"x": lambda x: x[:, :0]}, r"x must have between 1 and 2\^31 - 1 channels, got 0"),
    "weight-is-deep": ({"weight": zeros(4, 1, 3)}, r"weight must be \[channels, width\], got shape \[4, 1, 3\]"),
    "weight-is-narrow": ({"weight": zeros(4, 1)}, "weight must have a width between 2 and 8, got 1"),
    "weight-is-wide": ({"weight": zeros(4, 9)}, "weight must have a width between 2 and 8, got 9"),
    "weight-channels": ({"weight": zeros(3, 3)}, r"weight must have shape \[4, 3\], got \[3, 3\]"),
    "weight-is-double": ({"weight": lambda x: x.double()}, "weight must be float32, got float64"),
    "bias-shape": ({"bias": zeros(3)}, r"bias must have shape \[4\], got \[3\]"),
    "bias-is-double": ({"bias": zeros(4, dtype=F64)}, "bias must be float32, got float64"),
    "cu-is-wide": ({"cu_seqlens": lambda x: x[None]}, r"cu_seqlens must be \[sequences \+ 1\], got shape \[1, 3\]"),
    "activation": ({"activation": "relu"}, "activation must be None or \"silu\", got 'relu'"),
}


def check(operator: str, arguments: dict, changes: dict, message: str) -> None:
    assert_raises(getattr(packseq, operator), arguments, changes, f"{operator}: {message}")


@pytest.mark.parametrize("name", BAD_SCAN)
def test_bad_input_of_the_scan(device, name):
    changes, message = BAD_SCAN[name]
    good = good_scan(device)
    check("selective_scan", good, changes, message)
    pool = {"states": torch.zeros(9, 4, 3, device=device)}
    check("selective_scan_step", good | pool, changes, message)


@pytest.mark.parametrize("name", BAD_CONV)
def test_bad_input_of_the_convolution(device, name):
    changes, message = BAD_CONV[name]
    good = good_conv(device)
    check("causal_conv1d", good, changes, message)
    pool = {"states": torch.zeros(9, 4, 2, device=device)}
    check("causal_conv1d_step", good | pool, changes, message)


def test_bad_states(device, monkeypatch):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    for operator, good, width in (("selective_scan", good_scan(device), 3), ("causal_conv1d", good_conv(device), 2)):
        layout = "states" if width == 3 else "width - 1"
        like = "A" if width == 3 else "x"
        for change, message in (
            (zeros(3, 4, width), rf"initial_states must have shape \[2, 4, {width}\], got \[3, 4, {width}\]"),
            (zeros(2, 4, width, dtype=F64), f"initial_states must be float32 like {like}, got float64"),
        ):
            check(operator, good, {"initial_states": change}, message)

        step = good | {"states": torch.zeros(9, 4, width, device=device)}
        index = lambda *i: torch.tensor(i, dtype=torch.int32, device=device)  # noqa: E731
        for changes, message in (
            ({"states": zeros(9, 4)}, rf"states must be \[slots, channels, {layout}\], got shape \[9, 4\]"),
            ({"states": zeros(9, 4, 1)}, rf"states must have shape \[9, 4, {width}\], got \[9, 4, 1\]"),
            ({"states": zeros(9, 4, width, dtype=F64)}, f"states must be float32 like {like}, got float64"),
            ({"states": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)}, r"states must be contiguous, got"),
            ({"states": lambda x: x[:1]}, "states must have a slot for each of the 2 sequences, or indices must"),
            ({"indices": index(0, 1, 2)}, r"indices must have shape \[2\], got \[3\]"),
            ({"indices": index(0, 1).long()}, "indices must be int32, got int64"),
            ({"indices": index(0, 9)}, "indices must be negative or one of the 9 slots of states, got 9 at position 1"),
            ({"indices": index(7, 7)}, "indices must give each sequence a slot of its own, got 7 again at position 1"),
        ):
            check(f"{operator}_step", step, changes, message)


@bad_boundaries
def test_bad_boundaries(device, monkeypatch, values, message):
    monkeypatch.setenv("PACKSEQ_VALIDATE", "1")  # the CPU needs no asking
    for operator, good in (("selective_scan", good_scan(device)), ("causal_conv1d", good_conv(device))):
        bad = torch.tensor(values, dtype=torch.int32, device=device)
        check(operator, good, {"cu_seqlens": bad}, message)


def test_bad_gradients(device):
    u, delta, A, B, C, cu = good_scan(device).values()
    tensors = (u, delta, A, B, C, cu, None, None, None, None, False, False)
    states = torch.zeros(2, 4, 3, device=device)
    backward = torch.ops.packseq.selective_scan_backward
    backward(u, states, *tensors)
    for dout, dfinal_states, message in (
        (u[:5], None, r"dout must have shape \[6, 4\], got \[5, 4\]"),
        (u.half(), None, "dout must be float32 like u, got float16"),
        (u, states[:1], r"dfinal_states must have shape \[2, 4, 3\], got \[1, 4, 3\]"),
        (u, states.double(), "dfinal_states must be float32 like A, got float64"),
    ):
        with pytest.raises(ValueError, match=f"selective_scan_backward: {message}"):
            backward(dout, dfinal_states, *tensors)

    x, weight, cu = good_conv(device).values()
    tensors = (x, weight, cu, None, None, False, False)
    states = torch.zeros(2, 4, 2, device=device)
    backward = torch.ops.packseq.causal_conv1d_backward
    backward(x, states, *tensors)
    for dout, dfinal_states, message in (
        (x[:5], None, r"dout must have shape \[6, 4\], got \[5, 4\]"),
        (x, states.half(), "dfinal_states must be float32 like x, got float16"),
    ):
        with pytest.raises(ValueError, match=f"causal_conv1d_backward: {message}"):
            backward(dout, dfinal_states, *tensors)


@pytest.mark.gpu
def test_what_only_a_gpu_refuses():
    good = good_scan("cuda")
    for changes, message in (
        ({"delta": lambda x: x.cpu()}, "delta must be on cuda:0 like u, got cpu"),
        ({"A": lambda x: x.cpu()}, "A must be on cuda:0 like u, got cpu"),
        ({"C": lambda x: x.cpu()}, "C must be on cuda:0 like u, got cpu"),
        ({"cu_seqlens": lambda x: x.cpu()}, "cu_seqlens must be on cuda:0 like u, got cpu"),
        ({"u": lambda x: x.double()}, "u must be float16, bfloat16 or float32 on a GPU, got float64"),
    ):
        check("selective_scan", good, changes, message)
    good = good_conv("cuda")
    for changes, message in (
        ({"weight": lambda x: x.cpu()}, "weight must be on cuda:0 like x, got cpu"),
        ({"x": lambda x: x.double()}, "x must be float16, bfloat16 or float32 on a GPU, got float64"),
    ):
        check("causal_conv1d", good, changes, message)
