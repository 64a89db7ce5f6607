"""Who may include whom, what the built library asks of torch, and what may not be committed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import packseq
import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".in"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)

# Outside library -> the only room that may include it.
ROOMS = {"torch": "torch", "ATen": "torch", "c10": "torch", "pybind11": "python", "nccl.h": "ring"}
FOUNDATION = {"core"}  # includes nothing of ours but itself
TOP = {"torch", "python"}  # nothing below includes these


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_go_down(path):
    room = path.relative_to(CSRC).parts[0]
    rooms = {folder.name for folder in CSRC.iterdir()}
    for include in includes(path):
        assert not include.startswith(("../", "./", "/")), f"{include}: include paths start at csrc/"
        first = include.split("/")[0]
        assert ROOMS.get(first, room) == room, f"{include}: only csrc/{ROOMS.get(first)} may include it"
        if first in rooms and first != room:
            assert first not in TOP, f"{include}: csrc/{first} stands above csrc/{room}"
            assert room not in FOUNDATION, f"{include}: csrc/{room} stands on its own"


def test_sources_were_found():
    assert len(SOURCES) > 10
    assert any(include.startswith("torch/csrc/stable/") for path in SOURCES for include in includes(path))


def test_torch_headers_are_the_stable_ones():
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    ours = {f"torch/{path.name}" for path in (CSRC / "torch").glob("*.h")}
    for path in (CSRC / "torch").iterdir():
        for include in includes(path):
            if include.startswith(("torch/", "ATen/", "c10/")) and include not in ours:
                assert include.startswith(allowed), f"{path.name} includes {include}"


def audit(library: Path) -> dict:
    command = [Path(sys.executable).with_name("torch-abi-audit"), "--json", str(library)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    [result] = report["extensions"] + report["bundled_libs"]
    return result["torch"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_built_library_needs_only_the_stable_abi_of_torch_2_10():
    folder = Path(packseq._C.__file__).parent
    operators = audit(folder / "libpackseq_ops.so")
    assert operators["uses_torch"]
    assert operators["stable"], operators["unstable_symbols"]
    assert operators["unknown_shim_symbols"] == []
    assert tuple(map(int, operators["min_torch_version"].split(".")[:2])) <= (2, 10)
    assert not audit(Path(packseq._C.__file__))["uses_torch"]


def test_built_libraries_name_no_folder_of_the_build_machine():
    for library in Path(packseq._C.__file__).parent.glob("*.so"):
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
        assert paths in ([], ["$ORIGIN"]), f"{library.name}: {paths}"


def committed() -> list[Path]:
    """What git tracks; in an unpacked archive, what is there but for hidden and built folders."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "build"]
    return [path for folder in folders for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".pyc"]


def test_nothing_committed_names_a_folder_of_one_machine():
    folder = re.compile(r"(?<![\w.$})-])/(?:work|home|root|opt|tmp|mnt|Users|venv)/\w")
    found = []
    for path in committed():
        if path.suffix in {".png", ".npz", ".safetensors"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if folder.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
