"""What needs a GPU in the test's own process or in its peers': a real one, or the pretended one.

    python -m pytest -n0 -p tests.tools.pretended_gpu tests/gpu     # anywhere: see that package
    python -m pytest -n0 tests/gpu                                  # on a machine with a GPU

Without either these tests are skipped; `tests/whole/test_pretended_gpu.py` has them run by a process of its own.
"""

import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.tools.device_library import is_loaded

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> "torch.device":
    """The GPU. Every test of this folder is skipped where there is none."""
    import torch

    if not is_loaded() and not torch.cuda.is_available():
        pytest.skip("there is no GPU; a pretended one: -n0 -p tests.tools.pretended_gpu")
    return torch.device("cuda:0")


@pytest.fixture
def pretended() -> Any:
    """The pretended GPU as `pretended_gpu/device.pyi` says, its counts reset. Its limit is afterwards as before.

    A test that counts or limits is skipped on a real GPU.
    """
    if not is_loaded():
        pytest.skip("counted on the pretended GPU only")
    gpu = sys.modules["tests.tools.pretended_gpu"].device
    limits = [gpu.bytes_limit(index) for index in (0, 1)]
    gpu.reset()
    yield gpu
    gpu.on_wait(None)
    for index, limit in enumerate(limits):
        gpu.limit(limit, index)
