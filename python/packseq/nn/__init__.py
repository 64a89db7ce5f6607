"""Models over packed sequences, built on the operators: no padding anywhere, no copy to the host."""

from .bert import BertConfig, BertEncoder
from .rows import first_rows, mean_pool, sequences_and_positions

__all__ = ["BertConfig", "BertEncoder", "first_rows", "mean_pool", "sequences_and_positions"]
