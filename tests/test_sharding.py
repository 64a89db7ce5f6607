"""Which rows each rank has: nothing lost, nothing twice, evenly, in order."""

import packseq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packseq.ring import shard

LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 200)), max_size=8)
LAYOUTS = st.sampled_from(["zigzag", "contiguous"])
SPREADS = st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (4, 2), (6, 3), (8, 4), (8, 8), (8, 0)])


def spread_over(world: int, ulysses: int, lengths: list[int], layout: str) -> dict:
    """Options of shard; 0: every sequence its own ranks and number of ranks a shard."""
    if ulysses or layout == "contiguous":
        return {"layout": layout, "ulysses": ulysses or 1}
    kinds = [((0, world), 2), ((0, world // 2), 1), ((world // 2, world // 2), world // 2), ((2, 2), 2), ((1, 2), 1)]
    spans, widths = zip(*(kinds[i % len(kinds)] for i in range(len(lengths))), strict=True) if lengths else ((), ())
    return {"spans": spans, "ulysses": widths}


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, LAYOUTS, SPREADS)
def test_every_row_is_somewhere_once(lengths, layout, spread):
    world, ulysses = spread
    sharding = shard(boundaries(lengths), world, **spread_over(world, ulysses, lengths, layout))
    rows = torch.cat([sharding.rows(rank) for rank in range(world)])
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    assert sharding.sizes == [len(sharding.rows(rank)) for rank in range(world)]
    if ulysses or layout == "contiguous":
        assert max(sharding.sizes) - min(sharding.sizes) <= (2 if ulysses > 1 and layout == "zigzag" else 1)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, LAYOUTS, SPREADS)
def test_shard_and_unshard(lengths, layout, spread):
    world, ulysses = spread
    sharding = shard(boundaries(lengths), world, **spread_over(world, ulysses, lengths, layout))
    x = torch.arange(sum(lengths) + 3)[:, None] * torch.tensor([1, -1])
    parts = [sharding.shard(x, rank) for rank in range(world)]
    slack = torch.full((2, 2), 7)
    assert torch.equal(sharding.unshard([torch.cat([part, slack]) for part in parts]), x[: sum(lengths)])


@settings(max_examples=100, deadline=None)
@given(LENGTHS, LAYOUTS, SPREADS)
def test_positions_and_boundaries_are_those_of_the_rows(lengths, layout, spread):
    world, ulysses = spread
    cu_seqlens = boundaries(lengths)
    sharding = shard(cu_seqlens, world, **spread_over(world, ulysses, lengths, layout))
    sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    for rank in range(world):
        rows, positions = sharding.rows(rank), sharding.positions(rank)
        assert torch.equal(positions, rows - cu_seqlens[sequences[rows]])
        local = sharding.local_cu_seqlens(rank)
        assert local[-1] == len(rows)
        for begin, end in zip(local.tolist(), local.tolist()[1:], strict=False):
            assert end > begin
            assert torch.equal(rows[begin:end] - rows[begin], torch.arange(end - begin)), "a piece is a run of rows"
            assert len(sequences[rows[begin:end]].unique()) == 1
        breaks = rows.diff() != 1  # and no two pieces are one run of one sequence
        breaks |= sequences[rows].diff() != 0
        assert int(breaks.sum()) == max(len(local) - 2, 0)


def test_zigzag_balances_what_a_causal_mask_leaves():
    sharding = shard([0, 8000], 4)
    work = [int((sharding.positions(rank) + 1).sum()) for rank in range(4)]
    assert max(work) / min(work) < 1.001


def test_contiguous_sequences_straddle_at_most_the_ends_of_ranks():
    sharding = shard(boundaries([100] * 40), 8, "contiguous")
    assert all(x.stop - x.start == 5 for x in sharding.of_rank)


def test_spans_keep_sequences_on_their_ranks():
    lengths, spans = [40, 7, 300, 0, 9], [(0, 1), (2, 2), (0, 4), (1, 3), (3, 1)]
    sharding = shard(boundaries(lengths), 4, spans=spans)
    for rank, sequence, _, _ in sharding.pieces.tolist():
        first, count = spans[sequence]
        assert first <= rank < first + count
    assert sum(sharding.sizes) == sum(lengths)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1, 2], 2), {}, "cu_seqlens must be"),
        (([0, 5, 3], 2), {}, "cu_seqlens must be"),
        (([], 2), {}, "cu_seqlens must be"),
        (([0, 5], 0), {}, "ulysses must divide world, for all or each of 1 sequences, got 1 and 0"),
        (([0, 5], 4), {"ulysses": 3}, "ulysses must divide world, .* got 3 and 4"),
        (([0, 5], 4), {"ulysses": [2, 1]}, r"ulysses must divide world, .* got \[2, 1\] and 4"),
        (([0, 5, 9], 4), {"ulysses": [2, 3]}, r"ulysses must divide world, .* got \[2, 3\] and 4"),
        (([0, 5], 4), {"ulysses": 2, "spans": [(1, 2)]}, r"spans must be multiples of ulysses, got \[\(1, 2\)\] and"),
        (([0, 5], 4, "striped"), {}, "layout must be"),
        (([0, 5], 4, "contiguous"), {"spans": [(0, 1)]}, "spans must be None and ulysses one number"),
        (([0, 5], 4, "contiguous"), {"ulysses": [1]}, "spans must be None and ulysses one number"),
        (([0, 5], 4), {"spans": [(0, 5)]}, r"spans must be 1 pairs .* among 4, got \[\(0, 5\)\]"),
        (([0, 5], 4), {"spans": []}, "spans must be 1 pairs"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=f"shard: {message}"):
        shard(*arguments, **options)


def test_bad_rows():
    sharding = shard([0, 5], 2)
    with pytest.raises(ValueError, match=r"shard: x must have at least the batch's 5 rows, got shape \[4\]"):
        sharding.shard(torch.zeros(4), 0)
    with pytest.raises(ValueError, match=r"unshard: parts must be 2 tensors of at least \[3, 2\] rows, got"):
        sharding.unshard([torch.zeros(2), torch.zeros(2)])


def test_a_sharding_that_is_gone_is_missed():
    with pytest.raises(RuntimeError, match="the sharding must be kept"):
        packseq.ring.Sharding.of(torch.tensor([-1]))
