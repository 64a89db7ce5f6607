"""Sequence mixers that never pad: see packseq.attention, packseq.packing, and python -m packseq for what was built."""

from ._load import _C  # isort: skip  (first: it loads the operators that the rest registers with)

from . import nn, packing
from .attention import attention
from .packing import pack, unpack

__version__: str = _C.version
__all__ = ["attention", "nn", "pack", "packing", "unpack"]
