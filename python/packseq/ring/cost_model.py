"""What a step over sequences that are spread over ranks costs: seconds and memory.

``python -m packseq.ring.cost_model`` prints from which length on the ring's communication is hidden.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd, inf

try:
    import numpy as np
except ModuleNotFoundError as error:
    raise ImportError("packseq.ring.cost_model needs NumPy: pip install 'packseq[plan]'") from error


@dataclass(frozen=True)
class CostModel:
    """Seconds of one step (forward, or forward and backward) of a whole model, on each rank of a group.

    A group of ``d`` ranks takes a pack of sequences, each spread evenly over all of them. Every rank then does the
    linear work of its tokens and a ``d``-th of the attention, in ring steps, while keys and values go round. The
    exchange is hidden behind the attention of the same layer, never behind linear work; so a group takes
    ``overhead + linear + max(attention, exchange)``.

    With ``all_to_all_ranks`` above 1, so many neighbours of a group swap tokens for heads, which nothing hides, and the
    ring goes over the groups of neighbours: the two-dimensional scheme of USP (arXiv 2405.07719). A group of no more
    than ``all_to_all_ranks`` has no ring at all, as in DeepSpeed-Ulysses.
    """

    token_seconds: float  # the linear layers' work on one token
    pair_seconds: float  # attention of one query with one key, all layers and heads
    causal: bool = True
    window: int | None = None  # keys that a query sees at most; the ring carries all of them nevertheless
    tile: int = 64  # rows that the attention kernel works on at once: shorter pieces of sequences cost as much
    ring_bytes: float = 0.0  # what a token's keys and values, and their gradients, send in one step of the ring
    all_to_all_bytes: float = 0.0  # what a token's queries, keys, values and outputs send in an all-to-all
    all_to_all_ranks: int = 1
    node_link: float = 450e9  # bytes a second and direction of one rank, to ranks of its node
    fabric_link: float = 50e9  # of one network card, to other nodes
    gpus_per_node: int = 8
    cards_per_node: int = 8
    step_seconds: float = 0.0  # fixed, for each micro-step
    ring_step_seconds: float = 0.0  # fixed, for each step of the ring
    token_bytes: float = 0.0  # memory that a token takes until the step ends
    memory_bytes: float = inf  # for the tokens of a micro-step, on one rank

    def __post_init__(self):
        for name in (
            "tile",
            "all_to_all_ranks",
            "node_link",
            "fabric_link",
            "gpus_per_node",
            "cards_per_node",
            "memory_bytes",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"CostModel: {name} must be above 0, got {getattr(self, name)}")
        for name in ("token_seconds", "pair_seconds", "ring_bytes", "all_to_all_bytes", "step_seconds", "token_bytes"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"CostModel: {name} must be finite and at least 0, got {getattr(self, name)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"CostModel: window must be None or at least 1, got {self.window}")

    def pairs(self, length, pieces: int = 1):
        """Pairs of queries and keys that are computed when a sequence is cut into so many pieces, tiles filled up."""
        rows = self.tile * pieces
        n = np.ceil(np.asarray(length, float) / rows) * rows
        if not self.causal:
            return n * np.minimum(n, self.window or inf)
        seen = np.minimum(n, self.window or inf)
        return seen * (seen + 1) / 2 + (n - seen) * seen

    def work(self, length, ranks: int):
        """What sequences add to each rank of a group: ``(computing, exchanging)`` in seconds, each with linear work.

        Both add up over the sequences of a group, which then takes ``overhead(ranks)`` and the larger of the sums.
        ``length`` is a number or an array of numbers.
        """
        around = gcd(self.all_to_all_ranks, ranks)
        ring = ranks // around
        tokens = np.asarray(length, float) / ranks
        linear = self.token_seconds * tokens
        linear = linear + self.all_to_all_bytes * tokens * (around - 1) / around / self._link(around, around)
        # A causal ring gives each rank a piece from the front and one from the back (zigzag), for equal work.
        pieces = 1 if ring == 1 else 2 * ring if self.causal else ring
        attention = self.pair_seconds * self.pairs(length, pieces) / ranks
        return linear + attention, linear + self.ring_bytes * tokens * (ring - 1) / self._link(ranks, around)

    def overhead(self, ranks: int) -> float:
        """Seconds of a micro-step that do not depend on the sequences."""
        return self.step_seconds + self.ring_step_seconds * (ranks // gcd(self.all_to_all_ranks, ranks) - 1)

    def seconds(self, lengths, ranks: int) -> float:
        """One micro-step of a group of so many ranks over a pack of sequences."""
        computing, exchanging = self.work(np.atleast_1d(lengths), ranks)
        return self.overhead(ranks) + float(max(computing.sum(), exchanging.sum()))

    @property
    def tokens_per_rank(self) -> float:
        """Tokens of a micro-step that one rank has memory for."""
        return self.memory_bytes / self.token_bytes if self.token_bytes else inf

    def hidden_from(self, link: float) -> float:
        """Tokens a rank from which on one step of the ring takes longer to compute than to send, for one sequence."""
        pairs_per_token = 0.5 if self.causal else 1.0  # of its square; a window is not counted
        return self.ring_bytes / link / (self.pair_seconds * pairs_per_token) if self.pair_seconds else inf

    def _link(self, ranks: int, senders: int) -> float:
        """Of one rank to the next. A node's cards are shared by those of its ranks that send to other nodes.

        Groups stand at multiples of their size, so one whose size divides a node's stays inside a node.
        """
        if self.gpus_per_node % ranks == 0:
            return self.node_link
        return self.fabric_link * min(1.0, self.cards_per_node / min(senders, self.gpus_per_node))

    @classmethod
    def fit(cls, measured: Iterable[tuple[float, float]], **fields) -> "CostModel":
        """From ``(length, seconds)`` of steps over one sequence on one rank; other fields as given.

        ``step_seconds``, ``token_seconds`` and ``pair_seconds`` are those, at least 0, of the least squares of relative
        error. Three different lengths are needed, with attention's share in the longest well seen. Raises ValueError
        otherwise, or when a length or time is not above 0.
        """
        from scipy.optimize import nnls

        points = [(float(length), float(seconds)) for length, seconds in measured]
        if any(not (length > 0 and 0 < seconds < inf) for length, seconds in points):
            raise ValueError(f"fit: measured must hold lengths and seconds above 0, got {points}")
        if len({length for length, _ in points}) < 3:
            raise ValueError(f"fit: measured must hold at least three different lengths, got {points}")
        length, seconds = np.array(points).T
        terms = np.stack([np.ones_like(length), length, cls(0, 0, **fields).pairs(length)], 1)
        scale = terms.max(0)  # the solver wants columns of one magnitude
        step, token, pair = nnls(terms / scale / seconds[:, None], np.ones_like(length))[0] / scale
        return cls(token_seconds=float(token), pair_seconds=float(pair), step_seconds=float(step), **fields)

    @classmethod
    def h200(
        cls,
        *,
        parameters: float = 8e9,
        layers: int = 32,
        hidden: int = 4096,
        heads: int = 32,
        kv_heads: int = 8,
        head_dim: int = 128,
        training: bool = True,
        matrix_rate: float = 600e12,
        attention_rate: float = 500e12,
        memory_bytes: float = 100e9,
        **fields,
    ) -> "CostModel":
        """A decoder-only model (by default of Llama-3-8B's shape) in bfloat16 on H200s, from stated rates.

        FLOP a second: 8192^3 products were measured at 797e12, a model's mix of them with everything pointwise is
        taken at three quarters of that; causal attention with heads of 128 at 546 to 600e12 (FlashAttention-3, 8192
        long). NVLink 450 GB/s and InfiniBand 50 GB/s a direction and GPU. Training recomputes each layer in the
        backward, so that a token keeps one hidden vector a layer and one layer's working set; weights and optimizer are
        sharded over all ranks, which leaves the ``memory_bytes`` of 141 GB. The ring's keys, values and values'
        gradients: bfloat16 forward, again when recomputed and in the backward, with two float32 gradients.
        """
        forwards = 4 if training else 1  # forward, recomputed, and a backward of two
        attention_forwards = 4.5 if training else 1
        kv, q = kv_heads * head_dim, heads * head_dim
        model = {
            "token_seconds": 2 * parameters * forwards / matrix_rate,
            "pair_seconds": 4 * q * layers * attention_forwards / attention_rate,
            "ring_bytes": layers * 2 * kv * (3 * 2 + 4 if training else 2),
            "all_to_all_bytes": layers * 2 * (q + kv) * 2 * (3 if training else 1),
            "step_seconds": 100e-6 * layers * (3 if training else 1),
            "ring_step_seconds": 10e-6 * layers * (3 if training else 1),
            "token_bytes": 2 * hidden * layers + 34 * hidden if training else 4 * kv * layers + 34 * hidden,
            "memory_bytes": memory_bytes,
        }
        return cls(**(model | fields))


def hiding_table(model: CostModel) -> str:
    """One step of the ring at 1k to 1M tokens a rank: computing against sending, inside a node and across nodes."""
    header = f"{'tokens a rank':>13} {'attention':>12}" + "".join(
        f" {name:>12} {'hidden':>7}" for name in ("node link", "fabric link")
    )
    lines = [header]
    for tokens in (1024 * 2**k for k in range(11)):
        attention = model.pair_seconds * tokens**2 * (0.5 if model.causal else 1.0)
        sends = [model.ring_bytes * tokens / link for link in (model.node_link, model.fabric_link)]
        shares = "".join(f" {1e3 * send:>9.2f} ms {min(1.0, attention / send):>7.0%}" for send in sends)
        lines.append(f"{tokens:>13,} {1e3 * attention:>9.2f} ms{shares}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m packseq.ring.cost_model", description=hiding_table.__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--full", action="store_true", help="attention that is not causal")
    options = parser.parse_args()
    shape = {"layers": options.layers, "heads": options.heads, "head_dim": options.head_dim}
    print(
        "Sending in the ring against the attention of the same ring step, all layers, one sequence over any number of"
    )
    print(f"ranks; H200, bfloat16, {options.layers} layers, {options.heads} heads of {options.head_dim}.")
    for kv_heads in (options.heads, max(1, options.heads // 4)):
        for training in (False, True):
            model = CostModel.h200(**shape, kv_heads=kv_heads, training=training, causal=not options.full)
            print(f"\n{kv_heads} heads of keys and values, {'training' if training else 'forward'}")
            print(hiding_table(model))
            node, fabric = (model.hidden_from(link) for link in (model.node_link, model.fabric_link))
            print(f"hidden from {node:,.0f} tokens a rank on NVLink, {fabric:,.0f} on InfiniBand")


if __name__ == "__main__":
    main()
