"""Sequence parallelism: packed batches whose sequences are spread over ranks, for every mixer through one exchange.

It works inside any torch.distributed job, and launches nothing itself::

    sharding = packseq.ring.shard(cu_seqlens, world)            # once a step, the same on every rank
    ids, labels = (sharding.shard(x, rank) for x in (ids, labels))
    out = packseq.ring.ring_attention(q, k, v, sharding, causal=True)

Between CPU tensors it goes over the group's own backend (Gloo), between CUDA tensors over a communicator of ours.
"""

from importlib import import_module

from . import nn
from .attention import ring_attention
from .batches import pack_batches
from .communicator import Communicator, communicator
from .exchange import all_to_all, ring_exchange
from .gather import unshard
from .longconv import ring_long_conv
from .scan import ring_causal_conv1d, ring_selective_scan
from .sharding import Sharding, shard

__all__ = [
    "Communicator",
    "CostModel",
    "Plan",
    "Sharding",
    "all_to_all",
    "communicator",
    "nn",
    "pack_batches",
    "plan",
    "ring_attention",
    "ring_causal_conv1d",
    "ring_exchange",
    "ring_long_conv",
    "ring_selective_scan",
    "shard",
    "static_plan",
    "unshard",
]

_PLANNING = {"CostModel": "cost_model", "Plan": "planner", "plan": "planner", "static_plan": "planner"}


def __getattr__(name: str):
    """What needs NumPy or SciPy (``packseq[plan]``) is imported when it is asked for."""
    if name not in _PLANNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLANNING[name]}", __name__), name)
