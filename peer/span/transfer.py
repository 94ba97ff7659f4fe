"""Tensors between a peer's memory and its device. On the CPU they stay where they are."""

import torch

from protocol.tensors import KvPrefix

_PINNED = 2**20
"""Bytes of the largest tensor that goes through pinned memory: PyTorch keeps for ever what it has once pinned."""


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor there, of `dtype` if that is given. To a GPU by way of pinned memory: it need not be waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes <= _PINNED:
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype or tensor.dtype)


def prefix_on(prefix: KvPrefix, device: torch.device, dtype: torch.dtype) -> KvPrefix:
    """The prefix on a device, of a dtype."""
    return {
        block: (to_device(key, device, dtype), to_device(value, device, dtype))
        for block, (key, value) in prefix.items()
    }


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in this process's memory. Waits for the GPU, so that belongs on the compute thread."""
    if tensor.device.type != "cuda" or tensor.nbytes > _PINNED:
        return tensor.to("cpu")
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host
