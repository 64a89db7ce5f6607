"""Bin packing of sequences into batches of equal work."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packseq.ring.batches import pack_batches
from packseq.ring.cost_model import CostModel

COSTS = {"tokens": lambda n: n, "attention": lambda n: n * n}
some_lengths = st.lists(st.integers(0, 1000), max_size=40)


def heaviest(lengths: list[int], batches: list[list[int]], cost=COSTS["tokens"]) -> float:
    return max(sum(cost(lengths[i]) for i in batch) for batch in batches)


def assert_each_once(lengths: list[int], batches: list[list[int]]) -> None:
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for batch in batches)


@settings(deadline=None)
@given(lengths=some_lengths, capacity=st.integers(1000, 3000))
def test_capacity(lengths, capacity):
    batches = pack_batches(lengths, capacity=capacity)
    assert_each_once(lengths, batches)
    assert all(sum(lengths[i] for i in batch) <= capacity for batch in batches)
    assert all(batches)  # none is empty
    # No two batches could be one, or the second would not have been opened.
    tokens = sorted(sum(lengths[i] for i in batch) for batch in batches)
    assert len(tokens) < 2 or tokens[0] + tokens[1] > capacity


@settings(deadline=None)
@given(lengths=some_lengths, batches=st.integers(1, 9), cost=st.sampled_from(sorted(COSTS)))
def test_balance(lengths, batches, cost):
    found = pack_batches(lengths, batches, cost=cost)
    assert_each_once(lengths, found)
    assert len(found) == batches
    # Longest processing time first is within 4/3 of the best, which is no less than this.
    costs = sorted(map(COSTS[cost], lengths), reverse=True)
    pair = sum(costs[batches - 1 : batches + 1]) if len(costs) > batches else 0
    least = max([sum(costs) / batches, pair, *costs[:1]])
    assert heaviest(lengths, found, COSTS[cost]) <= least * 4 / 3 + 1e-9


@settings(deadline=None)
@given(lengths=some_lengths, batches=st.integers(1, 6), slack=st.floats(1.0, 2.0), cost=st.sampled_from(sorted(COSTS)))
def test_balance_under_a_capacity(lengths, batches, slack, cost):
    capacity = max(1000, int(slack * sum(lengths) / batches))
    try:
        found = pack_batches(lengths, batches, capacity=capacity, cost=cost)
    except ValueError as error:
        assert "found no way to fit" in str(error)  # noqa: PT017
        assert len(pack_batches(lengths, capacity=capacity)) > batches
        return
    assert_each_once(lengths, found)
    assert len(found) == batches
    assert heaviest(lengths, found) <= capacity


@pytest.mark.parametrize("seed", range(10))
def test_near_the_best_of_all_ways(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 70) for _ in range(8)]  # three batches of 200 hold them
    ways = [
        [[i for i, b in enumerate(way) if b == batch] for batch in range(3)]
        for way in itertools.product(range(3), repeat=len(lengths))
    ]
    for cost in COSTS:
        best = min(heaviest(lengths, way, COSTS[cost]) for way in ways)
        assert heaviest(lengths, pack_batches(lengths, 3, cost=cost), COSTS[cost]) <= 1.1 * best
    fewest = min(sum(map(bool, way)) for way in ways if heaviest(lengths, way) <= 200)
    assert len(pack_batches(lengths, capacity=200)) <= 11 / 9 * fewest + 1


def test_many_sequences_are_balanced_to_a_hair():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(7, 1)) for _ in range(512)]
    for cost in COSTS:
        found = pack_batches(lengths, 8, cost=cost)
        assert heaviest(lengths, found, COSTS[cost]) < 1.001 * sum(map(COSTS[cost], lengths)) / 8
    assert len(pack_batches(lengths, capacity=2 * max(lengths))) <= sum(lengths) // (2 * max(lengths)) + 1


def test_largest_differencing_beats_longest_first_where_it_should():
    lengths = [8, 7, 6, 5, 4]  # longest first: 8 + 5 + 4 against 7 + 6
    assert heaviest(lengths, pack_batches(lengths, 2)) == 16


def test_cost_can_be_a_function():
    model = CostModel.h200()
    lengths = [60_000, 30_000, 30_000, 10_000, 10_000, 10_000]
    found = pack_batches(lengths, 2, cost=lambda n: model.seconds(n, 1))
    assert found[0] == [0] or found[1] == [0]  # attention makes the longest as costly as the others together


def test_the_same_input_gives_the_same_batches():
    lengths = [5, 3, 5, 3, 5, 3, 0, 0]
    for arguments in ({"batches": 3}, {"capacity": 9}, {"batches": 4, "capacity": 9}):
        assert pack_batches(lengths, **arguments) == pack_batches(lengths, **arguments)


def test_nothing_to_pack():
    assert pack_batches([], 3) == [[], [], []]
    assert pack_batches([], capacity=5) == []
    assert pack_batches([], 2, capacity=5) == [[], []]
    assert pack_batches([7], 2) in ([[0], []], [[], [0]])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "batches or capacity must be given, got neither"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"capacity": 6}, r"lengths must be at most capacity=6, got 7 at position 1"),
        ({"lengths": [5, -1], "batches": 2}, "lengths must be at least 0, got -1 at position 1"),
        (
            {"batches": 1, "capacity": 8},
            "found no way to fit 12 tokens into 1 batches of 8; best-fit decreasing needs 2",
        ),
        (
            {"batches": 2, "cost": "words"},
            'cost must be "tokens", "attention" or a function of a length, got \'words\'',
        ),
        ({"batches": 2, "cost": lambda n: -n}, "cost must be finite and at least 0, got -5.0 for length 5"),
    ],
)
def test_bad_input(arguments, match):
    with pytest.raises(ValueError, match=match):
        pack_batches(**{"lengths": [5, 7], **arguments})
