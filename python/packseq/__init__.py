"""Sequence mixers that never pad: see packseq.attention, packseq.scan, packseq.filters, packseq.longconv,
packseq.packing, packseq.ring, and python -m packseq for what was built."""

from ._load import _C  # isort: skip  (first: it loads the operators that the rest registers with)

from . import filters, longconv, nn, packing, ring, scan
from .attention import attention
from .filters import (
    cauchy,
    cauchy_conj,
    s4_filter,
    s4d_filter,
    s4d_modes,
    vandermonde,
    vandermonde_conj,
    vandermonde_transpose,
)
from .longconv import long_conv, s4_step
from .packing import pack, unpack
from .scan import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

__version__: str = _C.version
__all__ = [
    "attention",
    "cauchy",
    "cauchy_conj",
    "causal_conv1d",
    "causal_conv1d_step",
    "filters",
    "long_conv",
    "longconv",
    "nn",
    "pack",
    "packing",
    "ring",
    "s4_filter",
    "s4_step",
    "s4d_filter",
    "s4d_modes",
    "scan",
    "selective_scan",
    "selective_scan_step",
    "unpack",
    "vandermonde",
    "vandermonde_conj",
    "vandermonde_transpose",
]
