import torch  # noqa: F401  (its libraries must be in the process before ours)

from . import _C  # noqa: F401
