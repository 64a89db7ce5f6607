"""Loads the compiled part, or says in one sentence why it cannot be."""

import importlib.machinery
import re
import sys
from pathlib import Path

OLDEST_TORCH = (2, 10)  # what the library asks of torch: see TORCH_TARGET_VERSION in third_party/FindTorchStable.cmake


def check_torch() -> str:
    """The version of the torch that is here; its libraries must be in the process before ours."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"packseq needs torch 2.10 or later, but {sys.prefix} has none: pip install torch") from None
    if tuple(int(x) for x in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        raise ImportError(
            f"packseq needs torch 2.10 or later, but found {torch.__version__} in {Path(torch.__file__).parent}: "
            "pip install --upgrade torch"
        )
    return torch.__version__


def explain(error: ImportError, torch_version: str) -> str:
    """One sentence for what kept the compiled module from loading."""
    here = Path(__file__).parent
    built = sorted(path.name for path in here.glob("_C.*.so"))
    if missing := re.search(r"(\S+\.so\S*): cannot open shared object file", str(error)):
        library, advice = missing[1], "install packseq again"
        if library.startswith("libtorch"):
            advice = f"torch {torch_version} is damaged or lacks it: install torch again"
        return f"packseq's compiled part needs {library}, which was not found: {advice}"
    if "undefined symbol" in str(error):
        return f"packseq's compiled part does not fit torch {torch_version}: install packseq again ({error})"
    if not built:
        return f"packseq's compiled part is not in {here}: run pip install . in the checkout, and import from elsewhere"
    if not any(name.endswith(suffix) for name in built for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        python = ".".join(map(str, sys.version_info[:2]))
        return f"packseq was built as {built[0]}, which Python {python} cannot load: install packseq again with it"
    return f"packseq's compiled part could not be loaded: {error}"


_torch_version = check_torch()
try:
    from . import _C
except ImportError as error:
    raise ImportError(explain(error, _torch_version)) from error

__all__ = ["_C"]
