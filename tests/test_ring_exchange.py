"""Tensors between ranks: values, gradients, and what happens when a rank is lost."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from packseq.ring import all_to_all, ring_exchange, shard, unshard
from ranks import meet, message_of, ranks, run_ranks
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]


def numbered(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(rows * 3).view(rows, 3) % 7 + 10 * rank).to(dtype)


def exchanged(group, rank: int, shift: int, dtype: torch.dtype) -> list[Tensor]:
    world = group.size()
    tensors = [numbered(rank, rank + 1, dtype), numbered(rank, 0, dtype), numbered(rank, 4, torch.float32)[0]]
    source = (rank - shift) % world
    return ring_exchange(tensors, group, shift, rows=[source + 1, 0, 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world", "shift"), [(1, 1), (2, 1), (3, -1), (4, 2), (4, 0), (8, 11)])
def test_ring_exchange(world, shift, dtype):
    for rank, got in enumerate(ranks().run(exchanged, world, shift, dtype)):
        source = (rank - shift) % world
        expected = numbered(source, source + 1, dtype), numbered(0, 0, dtype), numbered(source, 4, torch.float32)[0]
        for x, y in zip(got, expected, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def every_row_to_its_rank(group, rank: int) -> tuple[Tensor, Tensor]:
    world = group.size()
    x = torch.arange(world * (world + 1) // 2 * 2.0).view(-1, 2) + 1000 * rank
    x.requires_grad_()
    y = all_to_all(x, group, send_rows=range(1, world + 1), recv_rows=[rank + 1] * world)
    (dx,) = torch.autograd.grad((y * (rank + 1)).sum(), x)
    return y.detach(), dx


@pytest.mark.parametrize("world", [1, 3, 8])
def test_all_to_all_and_its_gradient(world):
    begins = [n * (n + 1) // 2 for n in range(world + 1)]
    for rank, (y, dx) in enumerate(ranks().run(every_row_to_its_rank, world)):
        mine = torch.arange(begins[-1] * 2.0).view(-1, 2)[begins[rank] : begins[rank + 1]]
        assert torch.equal(y, torch.cat([mine + 1000 * source for source in range(world)]))
        expected = torch.arange(1.0, world + 1).repeat_interleave(torch.arange(1, world + 1))
        assert torch.equal(dx, expected[:, None].expand(-1, 2))


def gradient_goes_back(group, rank: int) -> Tensor:
    x = torch.full((rank + 1, 2), 1.0, requires_grad=True)
    y, z = ring_exchange([x, 2 * x], group, 1, rows=[(rank - 1) % group.size() + 1] * 2)
    return torch.autograd.grad((y + 3 * z).sum() * (rank + 1), x)[0]


def test_the_gradient_of_ring_exchange_goes_the_other_way():
    for rank, dx in enumerate(ranks().run(gradient_goes_back, 3)):
        assert torch.equal(dx, torch.full((rank + 1, 2), 7.0 * ((rank + 1) % 3 + 1)))


def whole_again(group, rank: int) -> tuple[Tensor, Tensor]:
    sharding = shard([0, 5, 5, 18], group.size())
    x = torch.arange(18.0)[:, None]
    mine = sharding.shard(x, rank).requires_grad_()
    whole = unshard(mine, sharding, group)
    (grad,) = torch.autograd.grad((whole * x).sum(), mine)
    return whole.detach(), grad - group.size() * mine.detach()


def test_unshard_over_ranks():
    for whole, rest in ranks().run(whole_again, 4):
        assert torch.equal(whole, torch.arange(18.0)[:, None])
        assert (rest == 0).all()  # every rank's gradient came back


def checked(group, rank: int) -> None:
    name = group.group_name
    world = group.size()
    x, y = (torch.randn(world * 2, 3, requires_grad=True) for _ in range(2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    sharding = shard([0, 5, 9], world)
    q, k, v = (torch.randn(sharding.sizes[rank], 2, 8, requires_grad=True) for _ in range(3))
    options = (True, -1, -1, 0, 0.0, None, None, None)
    calls = [
        (torch.ops.packseq.ring_exchange, ([x, y], name, 1, None)),
        (torch.ops.packseq.all_to_all, (x, name, [2] * world, [2] * world)),
        (torch.ops.packseq.ring_attention, (q, k, v, sharding.key, name, *options)),
        (torch.ops.packseq.ring_gather, (q, sharding.key, name, "halo", 3)),
        (torch.ops.packseq.ring_pieces, (q.detach(), sharding.key, name, False)),
        (torch.ops.packseq.ring_sums_beyond, (q, True)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=tests)


def test_the_operators_are_good_citizens():
    ranks().run(checked, 2)


def compiled(group, rank: int) -> list[float]:
    def call(x):
        (y,) = ring_exchange([x * 2], group, 1)
        return all_to_all(y, group).sum() * x.sum()

    whole = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for rows in (2, 4, 8):
        x, y = (torch.full((rows, 3), rank + 1.0, requires_grad=True) for _ in range(2))
        for function, leaf in ((call, x), (whole, y)):
            function(leaf).backward()
        results += [float((x.grad - y.grad).abs().max()), float(whole(x) - call(x))]
    torch._dynamo.reset()
    return results


def test_the_operators_compile_whole():
    assert ranks().run(compiled, 2) == [[0.0] * 6] * 2


BAD = {
    "rows": (lambda x, g: ring_exchange([x], g, rows=[1, 2]), "ring_exchange: rows must be one number for each of 1"),
    "uneven": (
        lambda x, g: all_to_all(x[:3], g),
        "all_to_all: x must have rows that 2 ranks divide, or send_rows, got 3",
    ),
    "few": (lambda x, g: all_to_all(x, g, send_rows=[4]), "all_to_all: send_rows and recv_rows must be 2 numbers"),
    "sum": (lambda x, g: all_to_all(x, g, send_rows=[1, 1]), "as many rows as are sent"),
}


def bad_input(group, rank: int, name: str) -> str:
    return message_of(BAD[name][0], torch.zeros(4, 2), group)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    for message in ranks().run(bad_input, 2, name):
        assert re.search(BAD[name][1], message), message


def test_without_a_group():
    with pytest.raises(ValueError, match="ring: group must be given"):
        ring_exchange([torch.zeros(1)])


# ---- a rank is lost


def lose_a_rank(how: str) -> None:
    rank, store = dist.get_rank(), dist.group.WORLD.get_group_store()
    x = torch.ones(4, 2)
    ring_exchange([x], None, 1)
    if rank == 1:
        store.set("lost", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    lost = int(store.get("lost"))
    began = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        all(ring_exchange([x], None, 1) for _ in range(dist.get_world_size()))
    message = rf"ring: ring_exchange by 1 \((to|from) rank \d\) failed on rank {rank}: "
    assert re.match(message, str(raised.value)), str(raised.value)
    assert time.monotonic() - began < 30
    meet("raised", 3)
    if rank == 0 and how == "stopped":
        os.kill(lost, signal.SIGKILL)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_rank_makes_the_others_raise(how):
    run_ranks(lose_a_rank, 4, how, lost=(1,), device="cpu", timeout=timedelta(seconds=8))
