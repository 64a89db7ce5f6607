"""packseq.compat.mamba_ssm's causal_conv1d_update and selective_state_update on the test grids that causal-conv1d and
mamba-ssm publish; with skipped slots everywhere."""

from itertools import product

import packseq.compat.mamba_ssm as compat
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same_bits
from compat_formulas import assert_close, itypes, normal, plain_conv, uniform

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


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
