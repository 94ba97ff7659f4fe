"""Tensors between a peer's memory and its device. On the CPU they stay where they are.

All of it belongs on the compute thread. The event loop, which waits for nothing, has tensors in this process's memory.
"""

from collections.abc import Mapping

import torch

from protocol.machine import transfer
from protocol.tensors import KvPrefix

_BYTES = torch.uint8


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor there, of `dtype` if that is given. To a GPU by way of pinned memory: it need not be waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes <= transfer.PINNED:
        try:
            tensor = tensor.pin_memory()
        except RuntimeError:  # no more may be locked, or none at all (WSL2)
            return tensor.to(device, dtype or tensor.dtype)
        tensor = tensor.to(device, non_blocking=True)
    return tensor.to(device, dtype or tensor.dtype)


def prefix_on(prefix: KvPrefix, device: torch.device, dtype: torch.dtype) -> KvPrefix:
    """The prefix on a device, of a dtype."""
    return {
        block: (to_device(key, device, dtype), to_device(value, device, dtype))
        for block, (key, value) in prefix.items()
    }


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in this process's memory. Waits for the GPU."""
    return transfer.to_host([tensor])[0]


def all_to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, all on one device, in this process's memory: one copy and one wait for all of them together."""
    if len(tensors) < 2 or next(iter(tensors.values())).device.type == "cpu":
        return {name: to_host(tensor) for name, tensor in tensors.items()}
    aligned = dict(sorted(tensors.items(), key=lambda item: item[1].itemsize, reverse=True))
    flat = to_host(torch.cat([tensor.flatten().view(_BYTES) for tensor in aligned.values()]))
    parts = dict(zip(aligned, flat.split([tensor.nbytes for tensor in aligned.values()]), strict=True))
    return {name: parts[name].view(tensor.dtype).view(tensor.shape) for name, tensor in tensors.items()}
