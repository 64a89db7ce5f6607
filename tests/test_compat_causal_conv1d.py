"""packseq.compat.mamba_ssm's causal_conv1d_fn on the test grid that causal-conv1d publishes, its shapes, dtypes and
tolerances; with padding too."""

import math

import packseq.compat.mamba_ssm as compat
import pytest
import torch
from compare import assert_same_bits
from compat_formulas import assert_close, by_documents, documents, itypes, leaf, normal, plain_conv

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

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
