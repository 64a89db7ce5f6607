"""Modules, meshes and plans over ranks."""

import packseq
import packseq.ring.nn
import pytest
import torch
from operators import boundaries
from packseq.ring import CostModel, all_to_all, plan, ring_attention, shard
from ranks import message_of, ranks
from torch import Tensor
from torch.distributed import DeviceMesh, init_device_mesh

LENGTHS = [40, 3, 0, 90]
FEATURES = 8


def with_gradients(module: torch.nn.Module, hidden: Tensor, seed: Tensor, *where, **options) -> list[Tensor]:
    hidden = hidden.detach().requires_grad_()
    out = module(hidden, *where, **options)
    return [out.detach(), *torch.autograd.grad(out, [hidden, *module.parameters()], seed)]


def mamba_on_rank(group, rank: int, reverse: bool) -> list[Tensor]:
    torch.manual_seed(1)
    module = packseq.ring.nn.Mamba(FEATURES, d_state=4, bias=True)
    hidden, seed = torch.randn(2, sum(LENGTHS), FEATURES)
    sharding = shard(boundaries(LENGTHS), group.size())
    mine = [torch.cat([sharding.shard(x, rank), torch.full((2, FEATURES), torch.nan)]) for x in (hidden, seed)]
    out, dhidden, *grads = with_gradients(module, *mine, sharding, group, reverse=reverse)
    assert (out[-2:] == 0).all()
    assert (dhidden[-2:] == 0).all()
    return [out[:-2], dhidden[:-2], *grads]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_mamba_over_ranks_is_mamba(world, reverse):
    torch.manual_seed(1)
    module = packseq.nn.Mamba(FEATURES, d_state=4, bias=True)
    hidden, seed = torch.randn(2, sum(LENGTHS), FEATURES)
    expected = with_gradients(module, hidden, seed, boundaries(LENGTHS), reverse=reverse)
    sharding = shard(boundaries(LENGTHS), world)
    for i, parts in enumerate(zip(*ranks().run(mamba_on_rank, world, reverse), strict=True)):
        whole = sharding.unshard(parts) if i < 2 else torch.stack(parts).sum(0)
        torch.testing.assert_close(whole, expected[i], rtol=2e-5, atol=2e-5)


def by_mesh(group, rank: int) -> tuple[bool, str]:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ring",))
    x = torch.arange(8.0) + 10 * rank
    same = torch.equal(all_to_all(x, mesh), all_to_all(x, group))
    square = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "ring"))
    whole = all_to_all(x, square["ring"])
    return same and len(whole) == 8, message_of(all_to_all, x, square)


def test_a_mesh_of_one_dimension_is_its_group():
    for same, message in ranks().run(by_mesh, 8):
        assert same
        assert message.startswith("ring: group must be a mesh of one dimension")


def planned(group, rank: int) -> list[list[Tensor]]:
    """This rank's rows of q, and what attention gives them, for every micro-step of a plan."""
    step = []
    for lengths, spread in micro_steps(group.size()):
        sharding = shard(boundaries(lengths), group.size(), **spread)
        q, k, v = (sharding.shard(x, rank) for x in torch.randn(3, sum(lengths), 2, 8, generator=seeded()))
        step.append([sharding.rows(rank), ring_attention(q, k, v, sharding, group, causal=True)])
    return step


def micro_steps(world: int) -> list[tuple[list[int], dict]]:
    lengths = [400, 10, 30, 5, 77, 20, 64, 1, 130]
    made = plan(lengths, world, CostModel(1e-6, 1e-7, token_bytes=1, memory_bytes=200, all_to_all_ranks=2))
    return [
        ([lengths[i] for i in step.sequences], {"spans": step.spans, "ulysses": step.ulysses}) for step in made.steps
    ]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_what_the_planner_plans_is_what_sharding_takes():
    pytest.importorskip("scipy")
    steps = micro_steps(4)
    assert len({span for _, spread in steps for span in spread["spans"]}) > 2
    assert any(len(set(spread["ulysses"])) > 1 for _, spread in steps)
    for parts, (lengths, _) in zip(zip(*ranks().run(planned, 4), strict=True), steps, strict=True):
        q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=seeded())
        expected = packseq.attention(q, k, v, boundaries(lengths), causal=True)
        got = torch.full_like(expected, torch.nan)
        for rows, out in parts:
            got[rows] = out
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
