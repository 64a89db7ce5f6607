"""Sequence mixers that never pad: see packseq.attention, and python -m packseq for what was built."""

from ._load import _C

__version__: str = _C.version
