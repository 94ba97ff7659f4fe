"""GPUs that are not there. Import this before PyTorch, and `cuda:0` and `cuda:1` exist.

For pytest: `-n0 -p tests.tools.pretended_gpu`.

- `device.cpp`: the device as PyTorch sees it; `device.pyi` says how a test sees it
- `cuda`: what `torch.cuda` says of it

Values are real, as the CPU's kernels compute them on the host's memory: results equal those on the CPU, but for the
rounding of what PyTorch composes otherwise for CUDA. What that would refuse, tensors of two devices in one operation,
is refused; operations, copies and waits are counted; memory is limited (`device.limit`, `PRETENDED_GPU_BYTES`).
Autograd runs on a thread per device, as it would.

Not covered: kernels of CUDA's, streams and their races, pinned memory, CUDA graphs, Triton, time. bitsandbytes'
kernels for CPUs run, and nothing is compiled by torch.compile. `torch.cuda.is_available()` stays false, so that no
library looks for a driver: name the device (`--device cuda:0`).
"""

import ctypes
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from tests.tools.device_library import build

if "torch" in sys.modules:
    raise ImportError("import tests.tools.pretended_gpu before torch, which asks but once whether there is CUDA")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
_library = build()
ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402, F401  before the module below, whose types are PyTorch's

if TYPE_CHECKING:
    from tests.tools.pretended_gpu import device
else:
    _spec = importlib.util.spec_from_file_location(f"{__name__}.device", _library)
    device = sys.modules[f"{__name__}.device"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(device)

from tests.tools.pretended_gpu.cuda import pretend  # noqa: E402

pretend(int(os.environ.get("PRETENDED_GPU_BYTES", 12 * 2**30)))

__all__ = ["device"]
