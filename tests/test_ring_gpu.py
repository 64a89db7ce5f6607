"""The ring on GPUs: transfers run beside what is computed, and a captured graph replays."""

import pytest
import torch
import torch.distributed as dist
from compare import assert_same_bits
from operators import captured
from packseq.ring import ring_attention, ring_causal_conv1d, ring_selective_scan, shard
from ranks import meet, run_ranks
from torch import Tensor

pytestmark = pytest.mark.gpu
LENGTHS = [900, 0, 77, 300]


def attention(q: Tensor, k: Tensor, v: Tensor, sharding) -> Tensor:
    return ring_attention(q, k, v, sharding, causal=True)


def scan(q: Tensor, k: Tensor, v: Tensor, sharding) -> Tensor:
    u = ring_causal_conv1d(q.flatten(1), torch.ones(q[0].numel(), 4, device="cuda"), None, sharding)
    A = -torch.ones(u.shape[1], 8, device="cuda")
    return ring_selective_scan(u, k.flatten(1), A, v[:, :1, :8], v[:, :1, 8:16], sharding, delta_softplus=True)


def replay_with_other_contents(mixer) -> None:
    sharding = shard([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dist.get_world_size())
    rows = sharding.sizes[dist.get_rank()]
    tensors = [torch.randn(rows, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    mixer(*tensors, sharding)  # the communicator, and the plan on the device
    with torch.no_grad():
        graph, out = captured(lambda: mixer(*tensors, sharding))
        for _ in range(3):
            for x in tensors:
                x.normal_()
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits("out", out, mixer(*tensors, sharding))
    meet("replayed", dist.get_world_size())
    del graph, out


@pytest.mark.parametrize("mixer", [attention, scan])
def test_a_graph_replays(mixer):
    run_ranks(replay_with_other_contents, 2, mixer)


def transfers_beside_kernels() -> None:
    sharding = shard([0, 16384], dist.get_world_size())
    rows = sharding.sizes[dist.get_rank()]
    tensors = [torch.randn(rows, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    attention(*tensors, sharding)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            attention(*tensors, sharding)
        torch.cuda.synchronize()
    runs: dict[str, list[tuple[float, float]]] = {"nccl": [], "forward_kernel": []}
    for event in trace.events():
        for name, times in runs.items():
            if name in event.name and event.device_type == torch.autograd.DeviceType.CUDA:
                times.append((event.time_range.start, event.time_range.end))
    transfers, kernels = runs.values()
    assert transfers, "no transfer was traced"
    assert kernels, "no kernel was traced"
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in transfers for b in kernels)
    assert both > 0, f"transfers {transfers} never ran beside kernels {kernels}"


def test_transfers_run_beside_kernels():
    run_ranks(transfers_beside_kernels, 4)
