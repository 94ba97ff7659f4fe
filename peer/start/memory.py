"""The memory that a peer finds on its machine, and what it is used for."""

import contextlib
import ctypes

import psutil
import torch

WEIGHTS_SHARE = 0.6
"""Of the memory that is free at first, for weights, when nobody says how many blocks to serve."""
CACHE_SHARE = 0.25
"""Of the memory that is free after loading, for KV caches; the same again for kept activations and for adapters."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free for what a device computes with."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def return_freed_memory() -> None:
    """Have the C library give back what it holds.

    Quantizing leaves a multiple of each block's size behind, and a training call what its activations took: 2.8 GB of
    3.6, after steps of 8 x 256 tokens over 30 blocks of SmolLM2-135M on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
