"""The ring's communicator: over NCCL between processes where there is a GPU; elsewhere how its ranks come to agree."""

import importlib
import re
import threading
import time
from datetime import timedelta

import packseq
import pytest
import torch
import torch.distributed as dist
from packseq.ring import Communicator, communicator
from ranks import lose_this_rank, meet, run_ranks

module = importlib.import_module("packseq.ring.communicator")  # the function has its name

SHORT = timedelta(seconds=8)  # for ranks that get lost


def drawn(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank sends in a step; any rank can tell."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype).cuda()


def pass_on(ring: Communicator, step: int = 0) -> None:
    """A step round the ring, waited for on the host, from ranks known by their global number."""
    before, after = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    received = torch.zeros(1000, device="cuda")
    ring.exchange(
        [(drawn(ring.ranks[ring.rank], step, (1000,), torch.float32), after)], [(received, before)]
    ).synchronize()
    assert torch.equal(received, drawn(ring.ranks[before], step, (1000,), torch.float32))


def raises_within(call, seconds: float, pattern: str) -> str:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=pattern) as caught:
        call()
    assert time.monotonic() - start < seconds
    return str(caught.value)


# ---- between processes, on a GPU


def exchange_tensors():
    ring = communicator()
    assert ring is communicator()
    assert ring.ranks == tuple(range(ring.size))
    before, after = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    shapes = [(0,), (1,), (3, 0, 5), (7, 33), (1_000_003,)]
    for step, dtype in enumerate([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]):
        sent = [drawn(ring.rank, step, shape, dtype) for shape in shapes]
        received = [torch.zeros_like(x) for x in sent]
        under_way = ring.exchange([(x, after) for x in sent], [(x, before) for x in received])
        under_way.wait()
        sums = [x.clone() for x in received]  # on the current stream, which waits
        for shape, x in zip(shapes, sums, strict=True):
            assert torch.equal(x, drawn(before, step, shape, dtype))

    everyone = range(ring.size)  # itself too
    sent = [drawn(ring.rank, 10 + peer, (4096,), torch.float32) for peer in everyone]
    received = [torch.zeros(4096, device="cuda") for _ in everyone]
    ring.exchange(list(zip(sent, everyone, strict=True)), list(zip(received, everyone, strict=True))).synchronize()
    for peer, x in enumerate(received):
        assert torch.equal(x, drawn(peer, 10 + ring.rank, (4096,), torch.float32))

    with pytest.raises(ValueError, match=r"sends must be contiguous tensors on cuda:\d, got shape \[2\].* on cpu"):
        ring.exchange([(torch.zeros(2), after)], [])
    with pytest.raises(ValueError, match="receives must be contiguous"):
        ring.exchange([], [(torch.zeros(4, 4, device="cuda").T, before)])
    with pytest.raises(ValueError, match="sends must name peers from 0 to"):
        ring.exchange([(torch.zeros(2, device="cuda"), ring.size)], [])
    ring.check()


def exchange_without_waiting_for_memory():
    """Buffers that nobody holds are not given away while they are under way."""
    ring = communicator()
    before, after = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    kept = []
    for step in range(20):
        received = torch.zeros(1 << 20, device="cuda")
        sent = torch.full((1 << 20,), float(100 * step + ring.rank), device="cuda")
        under_way = ring.exchange([(sent, after)], [(received, before)])
        del sent
        torch.full((1 << 20,), -1.0, device="cuda")  # would be what was sent, if its memory were free
        if step % 2:
            under_way.wait()
        kept.append((under_way.ticket, received))
        del under_way
    for step, (ticket, received) in enumerate(kept):
        ring._core.synchronize(ticket)
        assert torch.all(received == 100 * step + before)


def exchange_then_add():
    """What is to be done with what has come is done behind it, on the exchanges' stream, and before anyone goes on."""
    ring = communicator()
    before, after = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    total = torch.zeros(1 << 20, device="cuda")
    for step in range(8):
        received = torch.zeros(1 << 20, device="cuda")
        sent = drawn(ring.rank, step, (1 << 20,), torch.float32)
        streams = []

        def add(received=received, streams=streams):
            streams.append(torch.cuda.current_stream())
            total.add_(received)

        under_way = ring.exchange([(sent, after)], [(received, before)], "and add", add, [total])
        assert [stream.cuda_stream for stream in streams] == [ring.stream.cuda_stream]
        assert torch.cuda.current_stream() != streams[0]
        under_way.synchronize() if step % 2 else under_way.wait()
        total.sub_(drawn(before, step, (1 << 20,), torch.float32))
        assert not total.any()


def exchange_in_a_graph():
    ring = communicator()
    pass_on(ring)  # connects
    before, after = (ring.rank - 1) % ring.size, (ring.rank + 1) % ring.size
    sent, received = torch.zeros(5000, device="cuda"), torch.zeros(5000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = sent * 2
        first = ring.exchange([(doubled, after)], [(received, before)])
        independent = sent + 1  # beside it
        first.wait()
        ring.exchange([(received, before)], [(sent, after)]).wait()  # and back
        total = received + independent
    for step in range(4):
        mine, theirs = (drawn(rank, step, (5000,), torch.float32) for rank in (ring.rank, before))
        sent.copy_(mine)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(received, 2 * theirs)
        assert torch.equal(sent, 2 * mine)
        assert torch.equal(total, 2 * theirs + mine + 1)
    ring.check()
    pass_on(ring)  # and outside again
    del graph


def lose_rank_2(told: bool):
    ring = Communicator(timeout=SHORT)
    pass_on(ring)
    meet("all have received", 4)
    if ring.rank == 2:
        lose_this_rank()
    seconds = SHORT.total_seconds()
    pattern = rf"step \d+ \(exchange with ranks? [\d and]+\).* on rank {ring.rank} of 4"
    # A rank that is not beside the lost one notices when its neighbours have stopped.
    text = raises_within(lambda: [pass_on(ring, step) for step in range(1, 20)], 3 * seconds, pattern)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        ring.check()
    torch.cuda.synchronize()  # nothing is left on the GPU that waits

    rest = ring.shrink([2] if told else None)
    assert rest.ranks == (0, 1, 3)
    for step in range(3):
        pass_on(rest, step)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        ring.check()
    halves = rest.split(0 if rest.rank < 2 else None)
    if halves is not None:
        pass_on(halves)


def shrink_what_is_whole():
    ring = Communicator(timeout=SHORT)
    pass_on(ring)
    if ring.rank == 0:
        return time.sleep(3)  # leaves, but is not lost
    rest = ring.shrink([0])
    assert (rest.ranks, rest.rank) == ((1, 2), ring.rank - 1)
    pass_on(rest)


def split_in_two():
    ring = communicator()
    part = ring.split(ring.rank % 2, key=-ring.rank)
    assert part.ranks == ((2, 0) if ring.rank % 2 == 0 else (3, 1))
    assert part.ranks[part.rank] == ring.rank
    for step in range(3):
        pass_on(part, step)
        pass_on(ring, step)
    assert (ring.split(None if ring.rank else 0) is None) == (ring.rank != 0)


def abort_what_waits():
    ring = communicator()
    pass_on(ring)
    if ring.rank == 0:
        return
    waiting = ring.exchange([], [(torch.zeros(100, device="cuda"), 0)])  # that rank 0 does not send
    threading.Timer(1, ring.abort).start()
    raises_within(waiting.synchronize, 15, f"rank {ring.rank} of 2 was aborted")
    torch.cuda.synchronize()


def end_with_the_group():
    group = dist.new_group(list(range(dist.get_world_size())))
    pass_on(communicator(group))
    meet("all have received", 2)
    dist.destroy_process_group(group)
    del group
    assert len(module._of_group) == 0
    pass_on(communicator())


GPU_RUNS = {
    "exchange_tensors": (exchange_tensors, 3),
    "exchange_tensors_alone": (exchange_tensors, 1),
    "memory": (exchange_without_waiting_for_memory, 2),
    "then": (exchange_then_add, 2),
    "graph": (exchange_in_a_graph, 2),
    "shrink_whole": (shrink_what_is_whole, 3),
    "split": (split_in_two, 4),
    "abort": (abort_what_waits, 2),
    "end": (end_with_the_group, 2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_RUNS)
def test_between_processes(name):
    worker, size = GPU_RUNS[name]
    run_ranks(worker, size)


@pytest.mark.gpu
@pytest.mark.parametrize("told", [True, False], ids=["told who", "finds out who"])
def test_others_raise_and_go_on_when_a_rank_is_lost(told):
    run_ranks(lose_rank_2, 4, told, lost=(2,))


# ---- without a GPU


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_needs_a_process_group():
    with pytest.raises(ValueError, match="group must be given"):
        communicator()
    with pytest.raises(ValueError, match="that this rank is in"):
        Communicator(dist.GroupMember.NON_GROUP_MEMBER)


def test_needs_a_gpu(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"NCCL needs a GPU, and torch {re.escape(torch.__version__)} finds none"):
        communicator()
    assert world not in module._of_group


@pytest.mark.skipif(packseq._C.has_cuda, reason="built with CUDA")
def test_a_build_without_cuda_says_so():
    for call in packseq._C.Communicator, packseq._C.Communicator.unique_id, packseq._C.Communicator.nccl:
        with pytest.raises(RuntimeError, match="built without CUDA"):
            call()


class Core:
    """Stands for _C.Communicator where only the agreement between ranks is tested."""

    can, works = True, True  # what NCCL's own shrink does

    def __init__(self, unique_id, rank, size, device, timeout):
        assert unique_id == b"an id"
        self.rank, self.size, self.device, self.timeout, self.stream = rank, size, device, timeout, 0
        self.made_by, self.aborted = "joining", False

    @staticmethod
    def nccl():
        return "2.28.9", "a library"

    @staticmethod
    def unique_id():
        return b"an id"

    def can_shrink(self):
        return self.can

    def abort(self):
        self.aborted = True

    def shrink(self, lost):
        if not self.works:
            raise RuntimeError("NCCL is at a loss")
        left = [rank for rank in range(self.size) if rank not in lost]
        return self.child(left.index(self.rank), len(left))

    def split(self, color, key):
        return None if color < 0 else self.child(key, 0)

    def child(self, rank, size):
        core = type(self)(b"an id", rank, size, self.device, self.timeout)
        core.made_by = "NCCL"
        return core


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(module._C, "Communicator", Core)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: None)


def on_ranks(size: int, call, timeout: float = 20, leave_out=()) -> list:
    """``call(communicator)`` of each rank, on a thread each; exceptions are results."""
    store = dist.HashStore()
    results = [None] * size

    def run(rank):
        try:
            core = Core(b"an id", rank, size, 0, timeout)
            made = Communicator.__new__(Communicator)
            made._hold(store, "key", tuple(10 + rank for rank in range(size)), core)
            results[rank] = call(made)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size) if rank not in leave_out]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def ways(results: list) -> list:
    """Each rank's new number and global ranks, and who made its communicator."""
    return [r and (r.rank, r.ranks, r._core.made_by) for r in results]


@pytest.mark.parametrize(("lost", "timeout"), [([2], 20), (None, 1)])
def test_shrink_is_nccls_own(cores, lost, timeout):
    results = on_ranks(4, lambda ring: ring.shrink(lost), timeout, leave_out=(2,))
    left = (10, 11, 13)
    assert ways(results) == [(0, left, "NCCL"), (1, left, "NCCL"), None, (2, left, "NCCL")]


@pytest.mark.parametrize("trouble", ["can", "works"])
def test_shrink_joins_anew_on_all_if_nccls_own_fails_on_one(cores, trouble):
    old = {}

    def call(ring):
        old[ring.rank] = ring._core
        if ring.rank == 3:
            setattr(ring._core, trouble, False)
        return ring.shrink([0])

    left = (11, 12, 13)
    assert ways(on_ranks(4, call, leave_out=(0,))) == [None, *((i, left, "joining") for i in range(3))]
    assert all(core.aborted for core in old.values())


def test_shrink_of_none_joins_anew(cores):
    assert ways(on_ranks(2, lambda ring: ring.shrink())) == [(i, (10, 11), "joining") for i in range(2)]


def test_a_rank_that_comes_late_counts_as_lost(cores):
    def call(ring):
        if ring.rank == 1:
            time.sleep(5)
        return ring.shrink()

    results = on_ranks(3, call, timeout=1)
    assert isinstance(results[1], RuntimeError)
    assert "rank 1 of 3 came to shrink late" in str(results[1])
    assert [results[0].ranks, results[2].ranks] == [(10, 12)] * 2


def test_shrink_waits_for_the_others_no_longer_than_it_must(cores):
    results = on_ranks(3, lambda ring: ring.shrink([1]), timeout=0.5, leave_out=(1, 2))
    assert "not all of ranks [0, 2] came to shrink1/can within 1 s" in str(results[0])


@pytest.mark.parametrize("lost", [[], [1], [0, 3], [-1]])
def test_bad_losses_are_named(cores, lost):
    results = on_ranks(3, lambda ring: ring.shrink(lost), leave_out=(0, 2))
    assert isinstance(results[1], ValueError)
    assert f"ranks from 0 to 2 without 1, got {lost}" in str(results[1])


def test_split_knows_who_is_in_each_part(cores):
    colors, keys = [0, 1, 0, None, 0], [5, 0, 5, 0, 1]
    results = on_ranks(5, lambda ring: ring.split(colors[ring.rank], keys[ring.rank]))
    assert [r and r.ranks for r in results] == [(14, 10, 12), (11,), (14, 10, 12), None, (14, 10, 12)]
    assert "color must be None or at least 0" in str(on_ranks(1, lambda ring: ring.split(-1))[0])


def test_a_communicator_of_a_group_joins_over_its_store(cores, world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    ring = communicator()
    assert communicator(world) is ring
    assert (ring.rank, ring.size, ring.ranks, ring.device) == (0, 1, (0,), torch.device("cuda", 0))
    assert ring.timeout == world.get_group_store().timeout
    assert Communicator(timeout=timedelta(seconds=3)).timeout == timedelta(seconds=3)
