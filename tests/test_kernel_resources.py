"""No kernel spills that had not: tests/kernel_resources.py over the built library."""

import subprocess
import sys
from pathlib import Path

import kernel_resources
import packseq
import pytest
from kernel_resources import Resources

REPORT = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7packseq1fILi64EEEvi:
  REG:32 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7packseq1gEv:
  REG:30 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:364 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
F, G = ("sm_80", "f<64>"), ("sm_80", "g")


def test_report_is_read():
    assert kernel_resources.parse(REPORT) == {F: Resources(32, 16, 1024), G: Resources(30, 0, 0)}


@pytest.mark.parametrize(
    ("name", "short"), [("f<A(int)>(B<C>, D)", "f<A(int)>"), ("g()", "g"), ("h", "h"), ("f<g(int)>", "f<g(int)>")]
)
def test_parameters_are_left_out(name, short):
    assert kernel_resources.without_parameters(name) == short


def test_table_survives_a_round_trip(tmp_path):
    table = kernel_resources.parse(REPORT)
    kernel_resources.write(tmp_path / "table.tsv", "13.0", table)
    assert kernel_resources.read(tmp_path / "table.tsv") == ("13.0", table)


@pytest.mark.parametrize(
    ("old", "new", "changes", "failures"),
    [
        ({G: Resources(30, 0, 0)}, {G: Resources(30, 0, 0)}, 0, 0),
        ({G: Resources(30, 0, 0)}, {G: Resources(40, 0, 0)}, 1, 0),  # more registers are told
        ({G: Resources(30, 0, 0)}, {G: Resources(30, 8, 0)}, 0, 1),  # the first spill fails
        ({G: Resources(30, 8, 0)}, {G: Resources(30, 8, 0)}, 0, 0),  # one that was accepted does not
        ({G: Resources(30, 8, 0)}, {G: Resources(30, 16, 0)}, 0, 1),
        ({}, {F: Resources(32, 16, 0)}, 0, 1),  # a new kernel may not start with spills unseen
        ({}, {F: Resources(32, 0, 0)}, 1, 0),
        ({F: Resources(32, 0, 0), G: Resources(30, 0, 0)}, {G: Resources(30, 0, 0)}, 1, 0),
    ],
)
def test_comparison(old, new, changes, failures):
    found = kernel_resources.compare(old, new)
    assert tuple(map(len, found)) == (changes, failures)


@pytest.mark.skipif(not packseq._C.has_cuda, reason="built without CUDA")
def test_no_kernel_uses_more_stack_than_before():
    script = Path(kernel_resources.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
