"""The package as a user meets it: what it says of itself, its self-check, and its words when something is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import packseq
import pytest
import torch
from packseq import __main__, _load, _selfcheck

ROOT = Path(__file__).parent.parent
DEFAULT = "80-real;90a-real;90-virtual"


def python(*args: str, path: Path | str | None = None, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd, env=environment)


def test_version_is_the_one_of_pyproject():
    assert packseq.__version__ == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_build_information():
    assert packseq._C.has_cuda == (packseq._C.cuda is not None) == bool(packseq._C.architectures)
    assert re.match(r"\w+ \d+\.", packseq._C.compiler)
    assert packseq._C.commit is None or re.fullmatch(r"[0-9a-f]{12}", packseq._C.commit)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (DEFAULT, (7, 5), False),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 0), True),  # through the PTX
        (DEFAULT, (12, 1), True),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("86-real", (8, 9), True),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("90a-virtual", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("120-real", (12, 0), True),
        ("80", (12, 0), True),
        ("", (8, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(architectures, capability, runs):
    problem = packseq._C.misfit(architectures, "NVIDIA X", *capability)
    assert (problem == "") == runs
    if not runs:
        advice = "needs 8.0 or later" if capability < (8, 0) else "TORCH_CUDA_ARCH_LIST={}.{}".format(*capability)
        assert f"architectures {architectures}" in problem
        assert "NVIDIA X with its compute capability" in problem
        assert problem.endswith(advice)


@pytest.mark.skipif(packseq._C.has_cuda, reason="built with CUDA")
def test_cuda_tensor_in_a_cpu_only_build_is_told_what_to_do():
    """No GPU is needed: the CUDA kernel is called by its key."""
    q, cu_seqlens = torch.randn(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    options = (None, False, -1, -1, 0, 0.0, None, None, None)
    with pytest.raises(RuntimeError, match=r"built without CUDA.*put nvcc on PATH.*move the tensors to the CPU"):
        torch.ops.packseq.attention.default.redispatch(on_cuda, q, q, q, cu_seqlens, *options)


def test_self_check_passes_in_a_fresh_process(tmp_path):
    done = python("-m", "packseq", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"packseq  {packseq.__version__}" in done.stdout
    assert "all checks passed" in done.stdout


@pytest.mark.parametrize("wrong", [lambda *_: 1.0, lambda *_: float("nan"), lambda *_: 1 / 0])
def test_self_check_fails_when_an_operator_is_wrong(wrong, monkeypatch, capsys):
    monkeypatch.setitem(_selfcheck.CHECKS, "attention", wrong)
    assert __main__.main() == 1
    assert "FAILED" in capsys.readouterr().out


def operators() -> set[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.split(".")[0] for space, name in names if space == "packseq"}


def test_every_operator_has_a_self_check():
    assert {name for name in operators() if not name.endswith("_backward")} == set(_selfcheck.CHECKS)


@pytest.mark.parametrize("name", sorted(operators()))
def test_every_operator_has_a_cpu_and_a_cuda_kernel(name):
    """In a CPU-only build the CUDA kernel is the one that says so."""
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"packseq::{name}", key)


def test_import_leaves_the_gpu_alone(tmp_path):
    """The driver is loaded, and a context made, only when something asks for a GPU."""
    maps = "'libcuda.so' in open('/proc/self/maps').read()"
    done = python("-c", f"import torch; a = {maps}; import packseq; print(a == ({maps}))", cwd=tmp_path)
    assert done.stdout.strip() == "True", done.stderr


def test_readme_sample_runs(tmp_path):
    sample = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    check = "assert out.shape == (347, 8, 64) and lse.shape == (347, 8) and torch.isfinite(lse).all()"
    done = python("-c", f"{sample}\n{check}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_devices_are_those_of_torch():
    assert [d.name for d in packseq._C.devices()] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert [d.capability for d in packseq._C.devices()] == [
        torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
    ]


def import_error(tmp_path: Path, path: Path | str) -> str:
    done = python("-c", "import packseq", path=path, cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    return last


def test_planning_alone_needs_scipy(tmp_path):
    absent = "import sys; sys.modules |= dict.fromkeys(['numpy', 'scipy', 'scipy.optimize']); import packseq.ring as r"
    done = python("-c", f"{absent}; print(r.shard([0, 5], 2).sizes, r.pack_batches([3, 1], 2)); r.plan", cwd=tmp_path)
    assert done.stdout.startswith("[3, 2] ")
    assert "pip install 'packseq[plan]'" in done.stderr.splitlines()[-1]


def source_tree_and(folder: Path) -> str:
    return f"{folder}{os.pathsep}{ROOT / 'python'}"


def test_old_torch_is_named(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.9.1+cu128'")
    message = import_error(tmp_path, source_tree_and(tmp_path))
    assert "needs torch 2.10 or later, but found 2.9.1+cu128" in message
    assert "pip install --upgrade torch" in message


def test_absent_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    assert "pip install torch" in import_error(tmp_path, source_tree_and(tmp_path))


def test_source_tree_without_compiled_part_is_named(tmp_path):
    assert "compiled part is not in" in import_error(tmp_path, ROOT / "python")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("libtorch.so: cannot open shared object file: No such file or directory", "install torch again"),
        ("libstdc++.so.6: cannot open shared object file: No such file", "needs libstdc++.so.6, which was not found"),
        ("libpackseq_ops.so: undefined symbol: aoti_torch_new", "does not fit torch 2.13.0: install packseq again"),
    ],
)
def test_loader_errors_become_one_sentence(error, said):
    assert said in _load.explain(ImportError(error), "2.13.0")
