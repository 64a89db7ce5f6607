"""mamba-ssm's and causal-conv1d's functions by their formulas, in the layout (batch, dim, length), and what their tests
share."""

import math
from itertools import pairwise

import pytest
import scan_reference as reference
import torch
import torch.nn.functional as F
from operators import random
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

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


def rows_of(x: Tensor) -> Tensor:
    """(batch, dim, length) as packed rows."""
    return x.transpose(1, 2).flatten(0, 1)


def plain_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Out and the last state."""
    batch, _, length = u.shape

    def matrix(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x
        if A.is_complex():  # pairs, next to each other in time
            x = reference.wide(x)
            x = torch.complex(x[..., 0::2], x[..., 1::2])
        return (x if x.dim() == 4 else x[:, None]).permute(0, 3, 1, 2).flatten(0, 1)

    options = {
        "D": D,
        "z": None if z is None else rows_of(z),
        "delta_bias": delta_bias,
        "delta_softplus": delta_softplus,
    }
    out, state = reference.selective_scan(
        rows_of(u), rows_of(delta), A, matrix(B), matrix(C), lengths=[length] * batch, **options
    )
    return out.unflatten(0, (batch, length)).transpose(1, 2), state


def plain_conv(x, weight, bias=None, activation=None, initial_states=None):
    """Out and the final states."""
    batch, _, length = x.shape
    options = {"activation": activation and "silu", "initial_states": initial_states}
    out, final = reference.causal_conv1d(rows_of(x), weight, bias, lengths=[length] * batch, **options)
    return out.unflatten(0, (batch, length)).transpose(1, 2), final


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
