"""What needs a GPU in the test's own process or in its peers': a real one, or the pretended one.

    python -m pytest -n0 -p tests.tools.pretended_gpu tests/gpu     # anywhere: see that package
    python -m pytest -n0 tests/gpu                                  # on a machine with a GPU

Without either these tests are skipped; `tests/whole/test_pretended_gpu.py` has them run by a process of its own.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tools.device_library import is_loaded

if TYPE_CHECKING:
    import torch

    from tests.tools.swarm import Both, ForkServer


@pytest.fixture(scope="session", autouse=True)
def device() -> "torch.device":
    """The GPU. Every test of this folder is skipped where there is none."""
    import torch

    if not is_loaded() and not torch.cuda.is_available():
        pytest.skip("there is no GPU; a pretended one: -n0 -p tests.tools.pretended_gpu")
    return torch.device("cuda:0")


@pytest.fixture(scope="session")
def other_device(device: "torch.device") -> "torch.device":
    """A second GPU, or the only one."""
    import torch

    return torch.device("cuda:1") if is_loaded() or torch.cuda.device_count() > 1 else device


@pytest.fixture(scope="session")
def llamas(fork_server: "ForkServer", other_device: "torch.device", models: Callable[[str], Path]) -> "Iterator[Both]":
    """The small llama, plain and through a peer on the CPU and one on a GPU; tests leave them as they find them."""
    from tests.tools.swarm import Both, new_swarm

    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:2")
        swarm.serve(models("llama"), "2:5", options=("--device", str(other_device)))
        yield Both(models("llama"), swarm)


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
    gpu.on_operation(None)
    gpu.on_wait(None)
    for index, limit in enumerate(limits):
        gpu.limit(limit, index)
