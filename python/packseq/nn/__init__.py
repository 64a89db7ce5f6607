"""Models over packed sequences, built on the operators: no padding anywhere, no copy to the host."""

from . import hippo
from .bert import BertConfig, BertEncoder
from .h3 import H3
from .lssl import LSSL
from .mamba import Mamba, MambaStates
from .mamba_lm import MambaConfig, MambaLM
from .rows import first_rows, mean_pool, sequences_and_positions
from .s4 import S4, S4D, S4States

__all__ = [
    "H3",
    "LSSL",
    "S4",
    "S4D",
    "BertConfig",
    "BertEncoder",
    "Mamba",
    "MambaConfig",
    "MambaLM",
    "MambaStates",
    "S4States",
    "first_rows",
    "hippo",
    "mean_pool",
    "sequences_and_positions",
]
