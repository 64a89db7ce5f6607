"""Small Mamba models with weights that are all alive, the block's formulas in plain torch, and what goes in."""

import math

import pytest
import torch
import torch.nn.functional as F
from operators import boundaries, random
from packseq.nn import Mamba, MambaConfig, MambaLM
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

LENGTHS = [5, 0, 40, 1, 23]
TOTAL = sum(LENGTHS)
D_MODEL = 32
SIZES = {
    **{"vocab_size": 67, "hidden_size": D_MODEL, "state_size": 16, "num_hidden_layers": 3, "conv_kernel": 4},
    **{"time_step_rank": 32, "use_bias": True},
}
CONFIG = MambaConfig(**SIZES)

dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda t: str(t).removeprefix("torch."))


def block_weights(name: str = "block", d_state: int = 16, d_conv: int = 4, rank: int = 32) -> dict[str, Tensor]:
    """Of a block, by mamba-ssm's names, all of them alive."""
    inner = 2 * D_MODEL
    shapes = {
        "in_proj.weight": (2 * inner, D_MODEL),
        "in_proj.bias": (2 * inner,),
        "conv1d.weight": (inner, 1, d_conv),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * d_state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, d_state),
        "D": (inner,),
        "out_proj.weight": (D_MODEL, inner),
        "out_proj.bias": (D_MODEL,),
    }
    return {n: random(*shape, seed=f"{name} {n}", dtype=F32) / math.sqrt(shape[-1]) for n, shape in shapes.items()}


def plain_block(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """One sequence through the block, step by step, in the dtype of the weights."""
    rank, inner = weights["dt_proj.weight"].shape[1], weights["D"].shape[0]
    d_state = weights["A_log"].shape[1]
    width = weights["conv1d.weight"].shape[2]
    x, z = (hidden @ weights["in_proj.weight"].T + weights["in_proj.bias"]).split(inner, 1)
    padded = F.pad(x, (0, 0, width - 1, 0))
    taps = [padded[k : k + len(x)] * weights["conv1d.weight"][:, 0, k] for k in range(width)]
    u = F.silu(sum(taps) + weights["conv1d.bias"])
    dt, B, C = (u @ weights["x_proj.weight"].T).split([rank, d_state, d_state], 1)
    delta = F.softplus(dt @ weights["dt_proj.weight"].T + weights["dt_proj.bias"])
    A = -weights["A_log"].exp()
    state, ys = torch.zeros_like(A), []
    for t in range(len(x)):
        state = torch.exp(delta[t, :, None] * A) * state + (delta[t] * u[t])[:, None] * B[t]
        ys.append(state @ C[t])
    y = torch.stack(ys) if ys else x
    return ((y + weights["D"] * u) * F.silu(z)) @ weights["out_proj.weight"].T + weights["out_proj.bias"]


def make_block(device: str = "cpu", dtype: torch.dtype = F32) -> Mamba:
    block = Mamba(D_MODEL, 16, 4, 2, 32, bias=True)
    block.load_state_dict(block_weights())
    return block.to(device, dtype)


def lm_weights(config: MambaConfig = CONFIG) -> dict[str, Tensor]:
    """Of a model, by mamba-ssm's names."""
    hidden = config.hidden_size
    weights = {"backbone.embedding.weight": random(config.vocab_size, hidden, seed="embedding", dtype=F32)}
    for i in range(config.num_hidden_layers):
        layer = f"backbone.layers.{i}"
        weights[f"{layer}.norm.weight"] = 1 + random(hidden, seed=f"norm {i}", dtype=F32) / 4
        weights |= {f"{layer}.mixer.{name}": x for name, x in block_weights(f"layer {i}").items()}
    weights["backbone.norm_f.weight"] = 1 + random(hidden, seed="norm_f", dtype=F32) / 4
    return weights | {"lm_head.weight": weights["backbone.embedding.weight"]}


def make_lm(device: str = "cpu", dtype: torch.dtype = F32) -> MambaLM:
    return MambaLM.from_mamba_ssm(lm_weights(), CONFIG, device=device, dtype=dtype)


def tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, CONFIG.vocab_size - 1, (length,), generator=generator)


def batch(lengths: list[int] = LENGTHS, device: str = "cpu") -> tuple[Tensor, Tensor]:
    ids = torch.cat([tokens(n, seed) for seed, n in enumerate(lengths)])
    return ids.to(device), boundaries(lengths, device)


def hidden_rows(total: int = TOTAL, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return random(total, D_MODEL, seed="hidden", dtype=F32).to(device, dtype)
