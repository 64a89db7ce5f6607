"""Models over packed sequences, built on the operators: no padding anywhere, no copy to the host."""

from .bert import BertConfig, BertEncoder
from .mamba import Mamba, MambaStates
from .mamba_lm import MambaConfig, MambaLM
from .rows import first_rows, mean_pool, sequences_and_positions

__all__ = [
    "BertConfig",
    "BertEncoder",
    "Mamba",
    "MambaConfig",
    "MambaLM",
    "MambaStates",
    "first_rows",
    "mean_pool",
    "sequences_and_positions",
]
