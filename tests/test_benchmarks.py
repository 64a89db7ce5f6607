"""The benchmarks' tables of cases hold what their comments and the floors in NOTES.md say of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[1] / "benchmarks"


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", _FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_gpu_attention_cases():
    cases = _load("attention_cases").attention_cases("gpu")
    assert len(cases) == 20
    assert {(c.shape, c.heads, c.dim) for c in cases} == {("d64", 32, 64), ("d128", 16, 128)}
    batches = {c.batch: (len(c.lengths), max(c.lengths), c.total) for c in cases}
    assert batches == {
        "32x512": (32, 512, 16384),
        "8x2048": (8, 2048, 16384),
        "2x8192": (2, 8192, 16384),
        "ragged16k": (31, 1867, 16384),
        "ragged64k": (113, 4096, 65536),
    }


def test_cpu_attention_cases():
    cases = _load("attention_cases").attention_cases("cpu")
    assert [c.name for c in cases] == [
        "d64 8x512 full",
        "d64 8x512 causal",
        "d64 docstrings full",
        "d64 docstrings causal",
    ]
    assert {(c.heads, c.dim) for c in cases} == {(8, 64)}
    assert (len(cases[2].lengths), max(cases[2].lengths)) == (64, 296)


def test_flops_count_real_work_only():
    full, causal, *_ = _load("attention_cases").attention_cases("gpu")
    assert full.flops() == 4 * 32 * 512**2 * 32 * 64
    assert causal.flops() == full.flops() / 2
    assert full.flops(backward=True) == 2.5 * full.flops()


def test_packing_cases():
    for case in _load("packing_cases").packing_cases():
        assert len(case.lengths) == case.batch
        assert all(0.2 * case.length <= n <= case.length for n in case.lengths)
        assert sum(case.lengths) == pytest.approx(0.6 * case.batch * case.length, rel=0.05)


def test_longconv_cases():
    cases = _load("longconv_cases").longconv_cases()
    assert [(c.name, len(c.lengths), c.longest) for c in cases] == [
        ("B128xL1024", 128, 1024),
        ("B32xL4096", 32, 4096),
        ("B8xL16384", 8, 16384),
        ("B2xL65536", 2, 65536),
        ("ragged1k", 129, 3160),
        ("ragged4k", 31, 16384),
    ]
    assert all((c.channels, c.total) == (768, 131072) for c in cases)
    assert [c.equal_lengths for c in cases] == [True] * 4 + [False] * 2
