"""What `torch.cuda`, and what of PyTorch depends on a build with CUDA, says where the device is a pretended one."""

import copy
from types import SimpleNamespace
from typing import Any

import torch

from tests.tools.pretended_gpu import device

_DEVICES = 2
_Which = torch.device | int | str | None


class _Stream:
    """The only one there is."""

    device_index = 0

    def synchronize(self) -> None:
        device.note_wait("stream.synchronize")

    def wait_stream(self, other: object) -> None:
        """All work is done already."""


def pretend(total: int) -> None:
    """Give each device `total` bytes, and bend `torch.cuda` to them."""
    for index in range(_DEVICES):
        device.limit(total, index)
    for name, replacement in _REPLACEMENTS.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.__deepcopy__ = _deepcopy  # type: ignore[method-assign, assignment]
    torch.histc = _histc  # type: ignore[assignment]


def _index(which: _Which) -> int:
    if which is None:
        return device.current_device()
    if isinstance(which, int):
        return which
    return torch.device(which).index or 0


def _synchronize(which: _Which = None) -> None:
    device.note_wait("torch.cuda.synchronize")


def _mem_get_info(which: _Which = None) -> tuple[int, int]:
    total = device.bytes_limit(_index(which))
    return max(0, total - device.bytes_now(_index(which))), total


def _properties(which: _Which = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="pretended GPU", major=8, minor=6, multi_processor_count=28, gcnArchName="",
        total_memory=device.bytes_limit(_index(which)),
    )  # fmt: skip


def _set_rng_state(state: torch.Tensor, which: _Which = None) -> None:
    torch.set_rng_state(state)


_REPLACEMENTS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_bf16_supported": lambda including_emulation=True: True,
    "current_stream": lambda which=None: _Stream(),
    "synchronize": _synchronize,
    "mem_get_info": _mem_get_info,
    "memory_allocated": lambda which=None: device.bytes_now(_index(which)),
    "memory_reserved": lambda which=None: device.bytes_now(_index(which)),
    "max_memory_allocated": lambda which=None: device.bytes_most(_index(which)),
    "reset_peak_memory_stats": lambda which=None: None,
    "empty_cache": lambda: None,
    "current_device": device.current_device,
    "get_rng_state": lambda which=None: torch.get_rng_state(),
    "set_rng_state": _set_rng_state,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_device_properties": _properties,
    "get_device_capability": lambda which=None: (8, 6),
}
_plain_deepcopy: Any = torch.Tensor.__deepcopy__
_plain_histc: Any = torch.histc


def _deepcopy(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """PyTorch's own makes a storage for a device that this build has not."""
    if not self.is_cuda or type(self).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return _plain_deepcopy(self, memo)  # type: ignore[no-any-return]
    if id(self) not in memo:
        with torch.no_grad():
            twin: torch.Tensor = self.data.clone()
        if isinstance(self, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, self.requires_grad)
        elif self.requires_grad:
            twin.requires_grad_()
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
    return memo[id(self)]  # type: ignore[no-any-return]


def _histc(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """CUDA's takes integers."""
    if input.is_floating_point() or not input.is_cuda:
        return _plain_histc(input, *args, **kwargs)  # type: ignore[no-any-return]
    counts: torch.Tensor = _plain_histc(input.float(), *args, **kwargs)
    return counts.to(input.dtype)
