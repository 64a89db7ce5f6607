"""How many ranks each sequence of a step is spread over.

Long sequences need many ranks, for time and for memory; short ones are slower on many than on one, as they then pay for
an exchange. So each step gets groups of ranks made for its own lengths, as in FlexSP (arXiv 2412.01523)::

    plan = packseq.ring.planner.plan(lengths, ranks=64, model=CostModel.h200())
    for step in plan.steps:
        # Which sequences, (first rank, number of ranks) of each, and how many of these ranks split heads.
        step.sequences, step.spans, step.ulysses

How :func:`plan` goes about it:

1. What memory does not hold at once is cut into micro-steps. One more than needed is tried too: the longest sequences
   on all ranks first, and then the others, can be quicker than side by side.
2. For a target time a *layout* is made: how many groups of each size it takes for all sequences to end in time. The
   greedy one gives each sequence the fewest ranks that make it; bisection finds the least target.
3. A layout becomes groups: longest first, each sequence goes where it ends soonest.
4. Where the outcome is more than ``gap`` above a lower bound, a mixed-integer program looks for layouts with smaller
   targets. It knows sequences of similar length as one bucket, and groups of one size as one pool, so it stays small;
   a tiny problem is given to it as it is, group by group.
5. The best of all these and of the layouts with one size for all groups is returned.

Every rank needs the same plan. By default the work is bounded by counts (solver nodes, rounds), never by a clock, so
the same input gives the same plan on every rank with the same SciPy and the same kind of CPU. Where these differ, or
with a ``time_limit``, plan on one rank and broadcast the plan (``torch.distributed.broadcast_object_list``).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from ._layouts import Answer, Problem, Search, greedy, least_target, realise, splits
from .cost_model import CostModel


@dataclass(frozen=True)
class Group:
    first: int  # its ranks are first .. first + ranks - 1
    ranks: int
    ulysses: int  # of them share a shard and split heads
    sequences: tuple[int, ...]  # positions in the lengths, ascending
    seconds: float


@dataclass(frozen=True)
class MicroStep:
    """Groups that run side by side and share no rank. Ranks in none of them have nothing to do."""

    groups: tuple[Group, ...]
    found_by: str  # "greedy", "milp" or "static"

    @property
    def seconds(self) -> float:
        return max((group.seconds for group in self.groups), default=0.0)

    @property
    def sequences(self) -> list[int]:
        """Positions in the lengths, ascending: the order to pack them in."""
        return sorted(i for group in self.groups for i in group.sequences)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first rank, number of ranks) of each of :attr:`sequences`."""
        return [(group.first, group.ranks) for group in self._group_of_each]

    @property
    def ulysses(self) -> list[int]:
        """How many ranks share a shard of each of :attr:`sequences`."""
        return [group.ulysses for group in self._group_of_each]

    @property
    def _group_of_each(self) -> list[Group]:
        groups = {i: group for group in self.groups for i in group.sequences}
        return [groups[i] for i in self.sequences]


@dataclass(frozen=True)
class Plan:
    steps: tuple[MicroStep, ...]  # one after another
    bound: float  # seconds that no plan goes below

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def plan(
    lengths: Sequence[int],
    ranks: int,
    model: CostModel,
    *,
    sizes: Sequence[int] | None = None,
    gap: float = 0.02,
    rounds: int = 2,
    node_limit: int = 20,
    time_limit: float | None = None,
) -> Plan:
    """The quickest plan found for one step; see the module's documentation for how.

    Args:
        lengths: tokens of each sequence.
        ranks: how many there are in all.
        model: what a sequence costs on so many ranks.
        sizes: ranks that a group may have, ascending, each a divisor of the next; by default the powers of two, and all
            ranks. Groups stand at multiples of their size, so that few communicators serve all plans, and none crosses
            more nodes than it must.
        gap: what is at most so far above the lower bound, relatively, is good enough.
        rounds: mixed-integer programs to solve at most; 0 leaves the greedy answer.
        node_limit: nodes that a program may branch into.
        time_limit: seconds of the whole call after which no program is started, and a running one is stopped.

    Returns:
        A :class:`Plan` that holds each sequence once, within the model's memory, never slower than
        :func:`static_plan` with any one of the sizes for all groups.

    Raises:
        ValueError: a value is wrong, or a sequence needs more memory than the largest group has.
    """
    start = time.monotonic()
    lengths, sizes = _check("plan", lengths, ranks, sizes)
    if not gap >= 0 or rounds < 0 or node_limit < 1 or (time_limit is not None and not time_limit >= 0):
        raise ValueError(
            "plan: gap, rounds and time_limit must be at least 0 and node_limit at least 1, got "
            f"gap={gap}, rounds={rounds}, time_limit={time_limit}, node_limit={node_limit}"
        )
    deadline = inf if time_limit is None else start + time_limit
    whole = Problem.of("plan", lengths, ranks, sizes, model)
    if not lengths:
        return Plan((), 0.0)

    drafts, best = [], None
    for parts in splits(whole):
        if drafts and len(parts) > len(drafts[0].searches) + 1:
            break
        if best and best.seconds <= max((1 + gap) * whole.bound, sum(part.bound for part in parts)):
            continue
        targets = [least_target(part) for part in parts]
        if best and best.seconds <= sum(targets):
            continue
        answers = [greedy(part, target) for part, target in zip(parts, targets, strict=True)]
        if None not in answers:
            drafts.append(_Draft([Search(*pair) for pair in zip(parts, answers, strict=True)]))
            best = min(drafts, key=lambda draft: draft.seconds)
    for _ in range(rounds):
        likely = min(drafts, key=lambda draft: draft.low)
        left = deadline - time.monotonic()
        if best.seconds <= likely.low + gap * whole.bound or left <= 0:
            break
        likely.search(best.seconds, node_limit, left)
        best = min(drafts, key=lambda draft: draft.seconds)
    found = best.plan(whole.bound)
    for k in range(len(sizes)):
        if whole.static_bound(k) < found.seconds:
            found = min(found, _static(whole, [(k, ranks // sizes[k])]), key=lambda plan: plan.seconds)
    return found


def static_plan(lengths: Sequence[int], groups: Sequence[int], model: CostModel) -> Plan:
    """The plan with groups of given sizes, such as ``[8] * 8`` or ``[32, *[1] * 32]``, whatever the lengths are.

    Its sequences are placed and its micro-steps are cut as well as :func:`plan` does it. Raises ValueError when a value
    is wrong, or a sequence needs more memory than the largest group has.
    """
    lengths, sizes = _check("static_plan", lengths, sum(groups), sorted(set(groups)))
    whole = Problem.of("static_plan", lengths, sum(groups), sizes, model)
    return _static(whole, [(k, groups.count(size)) for k, size in enumerate(sizes)]) if lengths else Plan((), 0.0)


@dataclass
class _Draft:
    """One way to cut into micro-steps, and the search for answers to each."""

    searches: list[Search]

    @property
    def seconds(self) -> float:
        return sum(search.best.seconds for search in self.searches)

    @property
    def low(self) -> float:
        """What is believed out of reach."""
        return sum(search.low for search in self.searches)

    def search(self, best: float, node_limit: int, seconds: float) -> None:
        """One program for the micro-step with most to gain, that aims halfway between ``low`` and the best plan."""
        most = max(self.searches, key=lambda search: search.best.seconds - search.low)
        enough = best - (self.low - most.low)
        most.program((most.low + min(most.best.seconds, enough)) / 2, node_limit, seconds)

    def plan(self, bound: float) -> Plan:
        return Plan(tuple(_micro_step(search.problem, search.best) for search in self.searches), bound)


def _static(whole: Problem, pools: list[tuple[int, int]]) -> Plan:
    for parts in splits(whole):
        answers = [realise(part, pools, "static") for part in parts]
        if None not in answers:
            break
    return Plan(tuple(_micro_step(*pair) for pair in zip(parts, answers, strict=True)), whole.bound)


def _micro_step(problem: Problem, answer: Answer) -> MicroStep:
    """The largest groups take the first ranks, so that each stands at a multiple of its size."""
    groups, first = [], 0
    for ranks, members, seconds in sorted(answer.groups, key=lambda group: -group[0]):
        sequences = tuple(sorted(problem.sequences[members].tolist()))
        groups.append(Group(first, ranks, problem.ulysses[problem.sizes.index(ranks)], sequences, seconds))
        first += ranks
    return MicroStep(tuple(groups), answer.found_by)


def _check(
    function: str, lengths: Sequence[int], ranks: int, sizes: Sequence[int] | None
) -> tuple[list[int], tuple[int, ...]]:
    if ranks < 1:
        raise ValueError(f"{function}: ranks must be at least 1, got {ranks}")
    lengths = [int(length) for length in lengths]
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{function}: lengths must be at least 0, got {length} at position {i}")
    if sizes is None:
        return lengths, tuple(sorted({2**k for k in range(ranks.bit_length())} | {ranks}))
    sizes = tuple(sizes)
    chain = all(small < large and large % small == 0 for small, large in pairwise(sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] > ranks or not chain:
        raise ValueError(
            f"{function}: sizes must be from 1 to {ranks}, ascending, each a divisor of the next, got {list(sizes)}"
        )
    return lengths, sizes
