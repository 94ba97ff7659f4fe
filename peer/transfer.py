"""Tensors between a peer's memory and its device. On the CPU they stay where they are."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor there, of `dtype` if that is given. To a GPU by way of pinned memory: it need not be waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype or tensor.dtype)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in this process's memory. Waits for the GPU, so that belongs on the compute thread."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host
