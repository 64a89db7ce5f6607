"""The planner's inside: layouts, how many groups of each size, and placing a micro-step's sequences into them."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd, inf

try:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
except ModuleNotFoundError as error:
    raise ImportError("packseq.ring.planner needs SciPy: pip install 'packseq[plan]'") from error

from .cost_model import CostModel


@dataclass(frozen=True)
class Problem:
    """Sequences, longest first, and what each costs on a group of each size."""

    ranks: int
    sizes: tuple[int, ...]
    ulysses: list[int]  # [size] ranks of a group that share a shard
    overhead: list[float]  # [size] seconds of a group
    room: list[float]  # [size] tokens of a group
    sequences: np.ndarray  # [n] positions in the lengths
    tokens: np.ndarray  # [n]
    work: np.ndarray  # [size, 2, n] seconds computing and exchanging
    alone: np.ndarray  # [size, n] seconds of a group that takes nothing else; inf where memory does not hold it

    @classmethod
    def of(cls, function: str, lengths: Sequence[int], ranks: int, sizes: tuple[int, ...], model: CostModel):
        tokens = np.asarray(lengths, float)
        sequences = np.argsort(-tokens, kind="stable")
        tokens = tokens[sequences]
        work = np.array([model.work(tokens, size) for size in sizes])
        ulysses = [gcd(model.all_to_all_ranks, size) for size in sizes]
        overhead = [model.overhead(size) for size in sizes]
        room = [size * model.tokens_per_rank for size in sizes]
        if len(lengths) and tokens[0] > room[-1]:
            raise ValueError(
                f"{function}: lengths must fit into the memory of {sizes[-1]} ranks, {int(room[-1])} tokens, got "
                f"{int(tokens[0])} at position {sequences[0]}"
            )
        fits = tokens <= np.array(room)[:, None]
        alone = np.where(fits, np.array(overhead)[:, None] + work.max(1), inf)
        return cls(ranks, sizes, ulysses, overhead, room, sequences, tokens, work, alone)

    def part(self, chosen: np.ndarray) -> "Problem":
        """Some of the sequences, still longest first."""
        picked = {name: getattr(self, name)[..., chosen] for name in ("sequences", "tokens", "work", "alone")}
        return replace(self, **picked)

    @property
    def rank_seconds(self) -> np.ndarray:
        """[n] of computing, where a sequence takes the fewest."""
        each = np.array(self.sizes)[:, None] * self.work[:, 0]
        return np.where(np.isinf(self.alone), inf, each).min(0)

    @property
    def bound(self) -> float:
        """Seconds that no answer goes below."""
        return float(max(self.alone.min(0).max(), min(self.overhead) + self.rank_seconds.sum() / self.ranks))

    def static_bound(self, k: int) -> float:
        shared = self.work[k, 0].sum() / (self.ranks // self.sizes[k])
        return float(max(self.alone[k].max(), self.overhead[k] + shared))


@dataclass(frozen=True)
class Answer:
    seconds: float
    groups: list[tuple[int, list[int], float]]  # (size, sequences of the problem, seconds)
    found_by: str


def splits(whole: Problem) -> Iterator[list[Problem]]:
    """Cuts into ever more micro-steps, from the fewest that memory allows on; at last each sequence has its own.

    Each number of them in two ways: dealt out like cards, so that each gets long and short ones, which fill ranks well;
    and by length, about as much work in each, so that the longest can have all ranks.
    """
    n, everything = len(whole.tokens), np.arange(len(whole.tokens))
    memory = whole.ranks * whole.room[0] / whole.sizes[0]  # tokens
    fewest = min(n, max(1, ceil(whole.tokens.sum() / memory)))
    for k in range(fewest, n + 1):
        yield [whole.part(everything[i::k]) for i in range(k)]
        if 1 < k < n:
            share = np.cumsum(whole.rank_seconds)
            cuts = np.searchsorted(share, share[-1] * np.arange(1, k) / k) + 1
            yield [whole.part(chosen) for chosen in np.split(everything, np.unique(cuts[cuts < n]))]


def realise(problem: Problem, pools: list[tuple[int, int]], found_by: str, chosen: list[int] | None = None):
    """Sequences, longest first, each into the group where it ends soonest; None where memory does not hold them.

    ``pools`` are (index of the size, number of groups); ``chosen`` says into which pool each sequence must go.
    """
    heaps = []
    for k, count in pools:  # groups as [end, tie-breaker, computing, exchanging, tokens, members]
        heaps.append([[problem.overhead[k], number, 0.0, 0.0, 0.0, []] for number in range(count)])
    work = {k: problem.work[k].T.tolist() for k, _ in pools}
    for i, length in enumerate(problem.tokens.tolist()):
        soonest, best = inf, None
        for j in range(len(pools)) if chosen is None else (chosen[i],):
            k, heap = pools[j][0], heaps[j]
            group = heap[0]
            if group[4] + length > problem.room[k]:
                group = min((g for g in heap if g[4] + length <= problem.room[k]), default=None)
                if group is None:
                    continue
            computing, exchanging = work[k][i]
            computing += group[2]
            exchanging += group[3]
            end = problem.overhead[k] + (computing if computing > exchanging else exchanging)
            if end < soonest:
                soonest, best = end, (heap, group, computing, exchanging)
        if best is None:
            return None
        heap, group, computing, exchanging = best
        at_top = group is heap[0]
        group[:5] = soonest, group[1], computing, exchanging, group[4] + length
        group[5].append(i)
        if at_top:
            heapq.heapreplace(heap, group)
        else:
            heapq.heapify(heap)
    groups = [
        (problem.sizes[k], group[5], group[0])
        for (k, _), heap in zip(pools, heaps, strict=True)
        for group in sorted(heap, key=lambda group: group[1])
        if group[5]
    ]
    return Answer(max(seconds for _, _, seconds in groups), groups, found_by)


class _Buckets:
    """Neighbouring sequences, all taken to be as their mean."""

    def __init__(self, problem: Problem, begins: np.ndarray):
        """``begins``: the first sequence of each bucket."""
        self.count = np.diff(np.append(begins, len(problem.tokens)))
        self.tokens = np.add.reduceat(problem.tokens, begins) / self.count  # [bucket]
        self.work = np.add.reduceat(problem.work, begins, axis=2) / self.count  # [size, 2, bucket]
        self.alone = problem.alone[:, begins]  # [size, bucket], of the longest

    @classmethod
    def of_equal_work(cls, problem: Problem, most: int) -> "_Buckets":
        """The longest sequences, which matter most, come out as buckets of their own."""
        work = problem.rank_seconds + 1e-12
        middle = np.cumsum(work) - work / 2
        return cls(problem, np.unique((most * middle / work.sum()).astype(int), return_index=True)[1])

    def rows(self) -> list[tuple]:
        """(count, tokens, [computing and exchanging on each size], [alone on each size]) as plain numbers."""
        columns = self.count, self.tokens, self.work.transpose(2, 0, 1), self.alone.T
        return list(zip(*(column.tolist() for column in columns), strict=True))


def least_target(problem: Problem) -> float:
    """The least target that the greedy layout reaches; inf where all ranks together have too little memory."""
    if problem.tokens.sum() > problem.ranks // problem.sizes[-1] * problem.room[-1]:
        return inf
    low, high = problem.bound, problem.overhead[-1] + float(problem.work[-1].sum(1).max())
    buckets = _Buckets.of_equal_work(problem, 20).rows()
    for _ in range(12):
        if high <= 1.005 * low:
            break
        middle = (low * high) ** 0.5
        if _greedy_layout(problem, buckets, middle):
            high = middle
        else:
            low = middle
    return high


def greedy(problem: Problem, target: float) -> Answer | None:
    """The best of a few layouts for about the target; None where memory holds none."""
    buckets = _Buckets.of_equal_work(problem, 20).rows()
    best, tried = None, []
    for slack in (1.0, 1.02, 1.05):
        layout = _greedy_layout(problem, buckets, target * slack)
        if layout and layout not in tried:
            tried.append(layout)
            best = _better(best, realise(problem, layout, "greedy"))
        if best and best.seconds <= 1.01 * target:
            break
    last = len(problem.sizes) - 1
    return best or realise(problem, [(last, problem.ranks // problem.sizes[last])], "greedy")


def _better(one: Answer | None, other: Answer | None) -> Answer | None:
    return other if one is None or (other is not None and other.seconds < one.seconds) else one


def _greedy_layout(problem: Problem, buckets: list[tuple], target: float) -> list[tuple[int, int]] | None:
    """Pools for all sequences to end by the target, were groups of a size one vessel; None where ranks do not suffice.

    From the longest bucket on: first into what is left of larger groups, then into new groups of the least size that
    ends by the target.
    """
    ranks, sizes = problem.ranks, range(len(problem.sizes))
    groups = [0 for _ in sizes]
    left = [(0.0, 0.0, 0.0) for _ in sizes]  # seconds of computing and of exchanging, tokens
    for count, tokens, work, alone in buckets:
        least = next((k for k in sizes if alone[k] <= target), None)
        if least is None:
            return None
        for k in reversed(sizes[least:]):
            if count and groups[k]:
                (computing, exchanging), (a, b, c) = work[k], left[k]
                shares = [x / use for x, use in ((a, computing), (b, exchanging), (c, tokens)) if use > 0]
                fits = max(0, int(min([count, *shares])))
                left[k] = a - fits * computing, b - fits * exchanging, c - fits * tokens
                count -= fits
        if count:
            (computing, exchanging), (a, b, c) = work[least], left[least]
            # Not less than one takes: what is lost to rounding must not keep it out.
            span = max(target - problem.overhead[least], computing, exchanging) or 1.0
            room = problem.room[least]
            new = max(1, ceil(count * max(computing / span, exchanging / span, tokens / room)))
            left[least] = (
                a + new * span - count * computing,
                b + new * span - count * exchanging,
                c + new * room - count * tokens,
            )
            groups[least] += new
            ranks -= new * problem.sizes[least]
            if ranks < 0:
                return None
    groups[0] += ranks // problem.sizes[0]
    return [(k, groups[k]) for k in sizes if groups[k]]


class Search:
    """The best answer known for a micro-step, and how to look for better ones."""

    def __init__(self, problem: Problem, best: Answer):
        self.problem, self.best = problem, best
        self.low = problem.bound  # what is believed out of reach
        self.buckets = None

    def program(self, target: float, node_limit: int, seconds: float) -> None:
        """Looks for an answer by the target. Without one, better ones are believed out of reach."""
        if self.buckets is None:
            self._prepare()
        layout = _milp_layout(self.problem, self.buckets, self.pools, target, node_limit, seconds)
        answer = None
        if layout is not None:
            groups, taken = layout
            used = [(k, count) for (k, _), count in zip(self.pools, groups, strict=True) if count]
            answer = realise(self.problem, used, "milp")
            if self.tiny:
                chosen = np.concatenate([np.repeat(np.arange(len(self.pools)), pool) for pool in taken.T]).tolist()
                answer = _better(answer, realise(self.problem, self.pools, "milp", chosen))
            self.best = _better(self.best, answer)
        if answer is None or answer.seconds > target:
            self.low = target

    def _prepare(self) -> None:
        begins = np.unique(-self.problem.tokens, return_index=True)[1]
        most = [self.problem.ranks // size for size in self.problem.sizes]
        self.tiny = len(begins) * sum(most) <= 200
        if self.tiny:
            self.pools = [(k, 1) for k, count in enumerate(most) for _ in range(count)]
            self.buckets = _Buckets(self.problem, begins)
        else:
            self.pools = list(enumerate(most))
            self.buckets = _Buckets.of_equal_work(self.problem, 12)


def _milp_layout(
    problem: Problem,
    buckets: _Buckets,
    pools: list[tuple[int, int]],  # (index of the size, most groups)
    target: float,
    node_limit: int,
    seconds: float,
) -> tuple[list[int], np.ndarray] | None:
    """``(groups [pool], sequences [pool, bucket])`` that end by the target on the fewest rank-seconds, or None.

    Unknown are the sequences of each bucket that each pool takes and the groups that each pool has. Every sequence is
    taken, the groups have enough ranks, and a pool's sequences take no more than its groups have of time to compute, of
    time to exchange, and of memory. A pool is not one vessel, though: no group holds more than c sequences that each
    take more than a (c + 1)-th of it, which for c = 1 and 2 is demanded too.
    """
    n, m = len(buckets.count), len(pools)
    rows, most = [], []  # rows @ unknowns <= most
    upper, price = np.zeros((m, n)), np.zeros((m, n))

    def demand(pool: int, weights: np.ndarray, groups: float) -> None:
        row = np.zeros(m * n + m)
        row[pool * n : (pool + 1) * n] = weights
        row[m * n + pool] = -groups
        rows.append(row)
        most.append(0.0)

    for j, (k, count) in enumerate(pools):
        in_time = buckets.alone[k] <= target
        upper[j] = np.where(in_time, buckets.count, 0)
        price[j] = problem.sizes[k] * buckets.work[k].max(0)
        if not in_time.any():
            continue
        span = target - problem.overhead[k]
        shares = *buckets.work[k] / (span or 1.0), buckets.tokens / problem.room[k], np.full(n, 1 / len(problem.tokens))
        for share in shares:
            demand(j, share, 1)
            for c in (1, 2) if count > 1 else ():
                large = np.maximum(np.ceil((c + 1) * share - 1e-9) - 1, 0) * in_time
                if large.any():
                    demand(j, large, c)
        if j and pools[j - 1] == pools[j]:  # groups alike are used in order
            row = np.zeros(m * n + m)
            row[m * n + j - 1 : m * n + j + 1] = -1, 1
            rows.append(row)
            most.append(0.0)
    rows.append(np.concatenate([np.zeros(m * n), [problem.sizes[k] for k, _ in pools]]))
    most.append(problem.ranks)
    each = np.hstack([np.tile(np.eye(n), m), np.zeros((n, m))])

    # Large buckets may be divided in fractions: the layout is what counts, and sequences are placed anew.
    whole = buckets.count <= (2 if any(count > 1 for _, count in pools) else inf)
    found = milp(
        np.concatenate([price.ravel(), np.zeros(m)]),
        integrality=np.concatenate([np.tile(whole, m), np.ones(m)]),
        bounds=Bounds(0, np.concatenate([upper.ravel(), [count for _, count in pools]])),
        constraints=[
            LinearConstraint(np.array(rows), -inf, most),
            LinearConstraint(each, buckets.count, buckets.count),
        ],
        options={"node_limit": node_limit, "mip_rel_gap": 0.05} | ({"time_limit": seconds} if seconds < inf else {}),
    )
    if found.x is None:
        return None
    return np.rint(found.x[m * n :]).astype(int).tolist(), np.rint(found.x[: m * n]).astype(int).reshape(m, n)
