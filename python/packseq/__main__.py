"""python -m packseq: what was built, what was found, and whether every operator computes what it should."""

import platform
import sys

import torch

from . import _C, __version__
from ._selfcheck import run


def _gpus() -> tuple[list[str], list[str]]:
    """A line for each visible GPU, and the devices that the operators can run on."""
    if not _C.has_cuda:
        advice = "not used, as packseq was built without CUDA: put nvcc on PATH and install packseq again"
        return [f"{torch.cuda.get_device_name(i)}: {advice}" for i in range(torch.cuda.device_count())], []
    try:
        seen = _C.devices()
    except RuntimeError as error:
        return [str(error)], []
    lines, usable = [], []
    for i, device in enumerate(seen):
        problem = device.problem
        if not problem and not torch.cuda.is_available():
            problem = f"not used by torch {torch.__version__}: install a CUDA build of torch"
        if not problem:
            usable.append(f"cuda:{i}")
        lines.append("{}, compute capability {}.{}: {}".format(device.name, *device.capability, problem or "supported"))
    return lines, usable


def _nccl() -> str:
    """What the ring goes over between GPUs."""
    try:
        version, path = _C.Communicator.nccl()
    except RuntimeError as error:
        return str(error)
    return f"{version}, {path}"


def main() -> int:
    cuda = f"CUDA {_C.cuda} for {_C.architectures}" if _C.has_cuda else "without CUDA"
    commit = f" (commit {_C.commit})" if _C.commit else ""
    torch_cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    lines, usable = _gpus()
    print(f"packseq  {__version__}{commit}")
    print(f"built    {cuda}, {_C.compiler}")
    print(f"torch    {torch.__version__} ({torch_cuda}), {torch.get_num_threads()} CPU threads")
    print(f"Python   {platform.python_version()}, {platform.platform()}")
    for line in lines or ["none visible"]:
        print(f"GPU      {line}")
    if usable:
        print(f"NCCL     {_nccl()}")

    print("\nself-check, forward and backward, against float64:")
    failed = 0
    for check in run(["cpu", *usable]):
        failed += not check.ok
        print(f"  {check}", flush=True)
    print(f"\n{failed} checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
