"""The memory that a peer finds on its machine, and what it is used for."""

import contextlib
import ctypes
import gc
from dataclasses import dataclass

import psutil
import torch

from protocol.errors import BadUsage

WEIGHTS_SHARE = 0.6
"""Of the memory that is free at first, for weights, when nobody says how many blocks to serve."""
_CACHE, _KEPT, _ADAPTERS = 0.25, 0.25, 0.2
"""Of the memory that is free after loading. The rest is for the call that runs: its graph takes as much as all that are
kept may, and the products that come and go take some, too."""


@dataclass(frozen=True)
class Budget:
    """What the memory is for that is free after loading: bytes, which add up to it."""

    cache: int
    """KV caches."""
    kept: int
    """What forwards leave for their backwards. The graph of the one that runs may take as much of `call`."""
    adapters: int
    """Clients' tensors, and as much again for what PEFT computes of their configurations."""
    call: int
    """What a call takes while it runs."""
    cache_tokens: int
    """Tokens of one row that `cache` holds."""
    max_length: int
    """Tokens that one session, or a row in training, may have: `cache` can hold them."""

    @classmethod
    def of(cls, free: int, token_bytes: int, cache_tokens: int | None, max_length: int) -> "Budget":
        """For `free` bytes and `token_bytes` for each cached token; `cache_tokens`, if the user said how many.

        Raises `BadUsage` where those do not fit.
        """
        tokens = max(1, int(free * _CACHE) // token_bytes) if cache_tokens is None else cache_tokens
        cache = tokens * token_bytes
        if cache > free:
            raise BadUsage(
                f"There is no memory for a KV cache of {tokens:,} tokens: it would take {cache / 1e9:,.2f} GB, and "
                f"{free / 1e9:,.2f} GB are free; choose fewer (--cache-tokens), or serve fewer blocks."
            )
        rest = (free - cache) / (1 - _CACHE)
        kept, adapters = int(rest * _KEPT), int(rest * _ADAPTERS)
        return cls(cache, kept, adapters, free - cache - kept - adapters, tokens, min(max_length, tokens))

    def describe(self) -> str:
        """A line for people."""
        return (
            f"memory: {self.cache / 1e9:,.2f} GB for KV caches of {self.cache_tokens:,} tokens, "
            f"{self.kept / 1e9:,.2f} GB for kept activations, {self.adapters / 1e9:,.2f} GB for adapters, "
            f"{self.call / 1e9:,.2f} GB for the call that runs; rows of up to {self.max_length:,} tokens"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free for what a device computes with."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def return_freed_memory() -> None:
    """Have Python, the C library and torch's allocator of a GPU give back what they hold.

    Module trees of adapters that are dropped refer to themselves, and Python looks for such at its leisure: 50
    trainings of small adapters leave 40 MB. Quantizing leaves a multiple of each block's size behind, and a training
    call what its activations took: 2.8 GB of 3.6, after steps of 8 x 256 tokens over 30 blocks of SmolLM2-135M.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
