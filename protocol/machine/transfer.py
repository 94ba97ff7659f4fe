"""Tensors between a device and this machine's memory: many copies, and one wait for all of them."""

from collections.abc import Iterable, Sequence

import torch

PINNED = 2**20
"""Bytes of the largest tensor that comes by way of pinned memory: PyTorch keeps for ever what it has once pinned."""


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, of any shapes and dtypes, in this machine's memory; one that is there already is returned as it is.

    In the order of the calling thread's current streams, each of which is waited for once.
    """
    copies = [_begin(tensor) for tensor in tensors]
    _wait(tensor.device for tensor in tensors)
    return copies


def to_devices(tensors: Sequence[torch.Tensor], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """Each tensor on the device of its number. What is not there yet is copied in the order of the calling thread's
    current streams; once this returns, it may be used on any stream."""
    copies = [copy_to(tensor, device) for tensor, device in zip(tensors, devices, strict=True)]
    _wait(copy.device for copy, tensor in zip(copies, tensors, strict=True) if copy is not tensor)
    return copies


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of this machine's memory on a device, for use on the calling thread's current stream there.

    Nothing is waited for: CUDA has read memory that is not pinned before the call returns.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def _begin(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return _room_for(tensor).copy_(tensor, non_blocking=True)


def _room_for(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of this machine for a tensor's copy; pinned where that is possible, which it is not everywhere (WSL2)."""
    if tensor.nbytes <= PINNED:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:
            pass
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _wait(devices: Iterable[torch.device]) -> None:
    for device in {device for device in devices if device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
