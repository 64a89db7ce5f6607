"""Sequences into batches of equal work: bin packing, for data parallelism and for prefilling prompts together.

Packing prompts into few full batches is Prepacking's idea (arXiv 2404.09529).
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from itertools import count
from math import inf, isfinite


def pack_batches(
    lengths: Sequence[int],
    batches: int | None = None,
    *,
    capacity: int | None = None,
    cost: str | Callable[[int], float] = "tokens",
) -> list[list[int]]:
    """Which sequences go together into a batch. The same input always gives the same answer.

    With ``capacity`` alone: as few batches as best-fit decreasing finds, at most 11/9 of the fewest and one more. With
    ``batches``: exactly so many, some perhaps empty, the costliest as cheap as the better of two ways finds it: largest
    differencing (Karmarkar and Karp) and longest processing time first. With both, none has more than ``capacity``
    tokens.

    Args:
        lengths: tokens of each sequence.
        batches: how many batches, such as the ranks of data parallelism.
        capacity: tokens that a batch holds at most.
        cost: what is balanced over ``batches``: ``"tokens"``, ``"attention"`` (the square of the length), or a function
            of a length, at least 0, such as ``lambda length: model.seconds(length, 1)`` with a
            :class:`~packseq.ring.cost_model.CostModel`.

    Returns:
        For each batch the positions of its sequences in ``lengths``, ascending.

    Raises:
        ValueError: neither ``batches`` nor ``capacity`` is given, or a value is wrong; a sequence is longer than
            ``capacity``; or no way was found to fit all sequences into ``batches`` of ``capacity``.
    """
    lengths = _check(lengths, batches, capacity)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if batches is None:
        return [sorted(batch) for batch in _best_fit(lengths, order, capacity)]

    costs = _costs(lengths, cost)
    by_cost = sorted(order, key=lambda i: -costs[i])
    found = [_differencing(costs, by_cost, batches), _longest_first(lengths, costs, by_cost, batches, capacity)]
    if capacity is not None:
        full = _best_fit(lengths, order, capacity)
        found = [way for way in [*found, full] if way is not None and _fits(lengths, way, batches, capacity)]
        if not found:
            raise ValueError(
                f"pack_batches: found no way to fit {sum(lengths)} tokens into {batches} batches of {capacity}; "
                f"best-fit decreasing needs {len(full)}"
            )
    best = min(found, key=lambda way: max((sum(costs[i] for i in batch) for batch in way), default=0))
    return [sorted(batch) for batch in best] + [[] for _ in range(batches - len(best))]


def _best_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sequence into the batch with the least room that still holds it."""
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, batch), ascending
    for i in order:
        place = bisect_left(rooms, (lengths[i], -1))
        if place == len(rooms):
            batches.append([])
            room, batch = capacity, len(batches) - 1
        else:
            room, batch = rooms.pop(place)
        batches[batch].append(i)
        insort(rooms, (room - lengths[i], batch))
    return batches


def _longest_first(
    lengths: list[int], costs: list[float], by_cost: list[int], batches: int, capacity: int | None
) -> list[list[int]] | None:
    """Each sequence into the cheapest batch that has room; None where none has."""
    found: list[list[int]] = [[] for _ in range(batches)]
    tokens = [0] * batches
    cheapest = [(0.0, batch) for batch in range(batches)]
    for i in by_cost:
        full = []
        while cheapest and tokens[cheapest[0][1]] + lengths[i] > (inf if capacity is None else capacity):
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        spent, batch = cheapest[0]
        heapq.heapreplace(cheapest, (spent + costs[i], batch))
        for entry in full:
            heapq.heappush(cheapest, entry)
        found[batch].append(i)
        tokens[batch] += lengths[i]
    return found


def _differencing(costs: list[float], by_cost: list[int], batches: int) -> list[list[int]]:
    """Joins the two most uneven partial answers, the one's costliest batches with the other's cheapest, until one is
    left. It starts with one answer a sequence."""
    number = count()  # breaks ties, so that lists are never compared
    empty = [(0.0, ())] * (batches - 1)
    answers = [(-costs[i], next(number), [*empty, (costs[i], (i,))]) for i in by_cost]  # each by ascending cost
    heapq.heapify(answers)
    while len(answers) > 1:
        one, other = heapq.heappop(answers)[2], heapq.heappop(answers)[2]
        joined = [(a + b, (i, j)) for (a, i), (b, j) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda batch: batch[0])
        heapq.heappush(answers, (joined[0][0] - joined[-1][0], next(number), joined))
    return [_flat(tree) for _, tree in answers[0][2]] if answers else [[] for _ in range(batches)]


def _flat(tree: tuple) -> list[int]:
    """The numbers in nested tuples; joining tuples themselves at each step would take quadratic time."""
    numbers, left = [], [tree]
    while left:
        for node in left.pop():
            numbers.append(node) if isinstance(node, int) else left.append(node)
    return numbers


def _fits(lengths: list[int], way: list[list[int]], batches: int, capacity: int) -> bool:
    return len(way) <= batches and all(sum(lengths[i] for i in batch) <= capacity for batch in way)


def _check(lengths: Sequence[int], batches: int | None, capacity: int | None) -> list[int]:
    lengths = [int(length) for length in lengths]
    if batches is None and capacity is None:
        raise ValueError("pack_batches: batches or capacity must be given, got neither")
    if batches is not None and batches < 1:
        raise ValueError(f"pack_batches: batches must be at least 1, got {batches}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"pack_batches: capacity must be at least 1, got {capacity}")
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"pack_batches: lengths must be at least 0, got {length} at position {i}")
        if capacity is not None and length > capacity:
            raise ValueError(f"pack_batches: lengths must be at most capacity={capacity}, got {length} at position {i}")
    return lengths


def _costs(lengths: list[int], cost: str | Callable[[int], float]) -> list[float]:
    named = {"tokens": lambda length: length, "attention": lambda length: length**2}
    function = named.get(cost) if isinstance(cost, str) else cost
    if not callable(function):
        raise ValueError(f'pack_batches: cost must be "tokens", "attention" or a function of a length, got {cost!r}')
    costs = [float(function(length)) for length in lengths]
    for length, value in zip(lengths, costs, strict=True):
        if not (value >= 0 and isfinite(value)):
            raise ValueError(f"pack_batches: cost must be finite and at least 0, got {value} for length {length}")
    return costs
