"""Rows for heads: the ranks of a shard each get all of its rows and a part of the heads, and give them back."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from torch.distributed import ProcessGroup

from .exchange import run
from .sharding import Part


class Heads:
    """How the ranks of a shard split heads.

    Query heads go by whole groups where there are at least as many key and value heads as ranks, and one by one where
    there are fewer: then some key and value heads go to several ranks.
    """

    def __init__(self, part: Part, group: ProcessGroup, heads: int, kv_heads: int):
        self.group, self.width = group, part.ulysses
        shard, self.mine = divmod(group.rank(), self.width)
        self.peers = range(shard * self.width, (shard + 1) * self.width)
        self.rows = [part.ranks.sizes[peer] for peer in self.peers]
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"ring_attention: k must have a number of heads that divides q's {heads}, got {kv_heads}")
        group_size = heads // kv_heads
        unit = group_size if kv_heads >= self.width else 1  # the fewest query heads that are dealt out together
        bounds = [i * (heads // unit) // self.width * unit for i in range(self.width + 1)]
        self.q_parts = [slice(a, b) for a, b in pairwise(bounds)]
        self.kv_parts = [
            slice(a // group_size, -(-b // group_size) if b > a else a // group_size) for a, b in pairwise(bounds)
        ]
        self.of_q, kv = self.q_parts[self.mine], self.kv_parts[self.mine]
        # Where its query heads do not fill the groups they are of, each gets a key and value head of its own.
        fills = self.of_q.start % group_size == 0 == self.of_q.stop % group_size
        mine = range(self.of_q.start, self.of_q.stop)
        self.kv_of_q = None if fills or kv.stop - kv.start == 1 else [h // group_size - kv.start for h in mine]

    def split(self, of_q: Sequence[Tensor], of_kv: Sequence[Tensor]) -> list[Tensor]:
        """All of the shard's rows, of this rank's heads."""
        tensors = [*of_q, *of_kv]
        if self.width == 1:
            return tensors
        parts = [*[self.q_parts] * len(of_q), *[self.kv_parts] * len(of_kv)]
        results, sends, receives = [], [], []
        for x, part in zip(tensors, parts, strict=True):
            mine = part[self.mine]
            results.append(x.new_empty(sum(self.rows), mine.stop - mine.start, *x.shape[2:]))
            sends += [(x[:, heads].contiguous(), peer) for heads, peer in zip(part, self.peers, strict=True)]
            receives += zip(results[-1].split(self.rows), self.peers, strict=True)
        run(sends, receives, self.group, "rows for heads")
        if self.kv_of_q is not None:
            results[len(of_q) :] = [x[:, self.kv_of_q] for x in results[len(of_q) :]]
        return results

    def join(self, of_q: Sequence[Tensor], of_kv: Sequence[Tensor] = ()) -> list[Tensor]:
        """The way back: this rank's rows, of all heads. What came from several ranks is added up."""
        rows = self.rows[self.mine]
        tensors = [*of_q, *map(self._of_groups, of_kv)]
        if self.width == 1:
            return tensors
        parts = [*[self.q_parts] * len(of_q), *[self.kv_parts] * len(of_kv)]
        arriving, sends, receives = [], [], []
        for x, part in zip(tensors, parts, strict=True):
            arriving.append([x.new_empty(rows, heads.stop - heads.start, *x.shape[2:]) for heads in part])
            sends += [(y.contiguous(), peer) for y, peer in zip(x.split(self.rows), self.peers, strict=True)]
            receives += zip(arriving[-1], self.peers, strict=True)
        run(sends, receives, self.group, "heads for rows")
        results = []
        for part, arrived in zip(parts, arriving, strict=True):
            results.append(arrived[0].new_zeros(rows, part[-1].stop, *arrived[0].shape[2:]))
            for heads, x in zip(part, arrived, strict=True):
                results[-1][:, heads] += x
        return results

    def _of_groups(self, x: Tensor) -> Tensor:
        """Key and value heads again, from one for each query head."""
        if self.kv_of_q is None:
            return x
        kv = self.kv_parts[self.mine]
        total = x.new_zeros(x.shape[0], kv.stop - kv.start, *x.shape[2:])
        for i, head in enumerate(self.kv_of_q):
            total[:, head] += x[:, i]
        return total
