"""Sequence mixers that never pad: see packseq.attention, packseq.scan, packseq.packing, and python -m packseq for what
was built."""

from ._load import _C  # isort: skip  (first: it loads the operators that the rest registers with)

from . import nn, packing, scan
from .attention import attention
from .packing import pack, unpack
from .scan import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

__version__: str = _C.version
__all__ = [
    "attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "nn",
    "pack",
    "packing",
    "scan",
    "selective_scan",
    "selective_scan_step",
    "unpack",
]
