"""What every test shares: the devices, and which tests run where."""

import os

# Before torch starts its threads: on a machine that does other work too, threads that wait actively make the many
# small products of the references many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import packseq
import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def why_no_gpu() -> str | None:
    if not packseq._C.has_cuda:
        return "packseq was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def pytest_collection_modifyitems(config, items):
    reason = why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
    if "big" not in config.option.markexpr:  # -m gpu alone does not ask for them
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("big")])
        items[:] = [item for item in items if not item.get_closest_marker("big")]


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    yield
    torch._dynamo.reset()
