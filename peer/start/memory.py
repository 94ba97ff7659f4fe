"""The memory that a peer finds on its machine, and what it is used for."""

import contextlib
import ctypes
import gc
from dataclasses import dataclass

import psutil
import torch

from peer.start.options import MemoryLimit
from protocol.errors import BadUsage
from protocol.records import MemoryShares, Share

WEIGHTS_SHARE = 0.6
"""Of the memory that is free at first, for weights, when nobody says how many blocks to serve."""
_CACHE, _KEPT, _ADAPTERS = 0.25, 0.25, 0.2
"""Of the memory that is free after loading. The rest is for the call that runs: its graph takes as much as all that are
kept may, and the products that come and go take some, too."""
_LEAST_ADAPTERS = 0.05
ROW = 2048
"""Tokens of a row that is to be trained and cached before the shares are what they are above."""


@dataclass(frozen=True)
class Budget:
    """What the memory is for that is free after loading: bytes, which add up to it."""

    cache: int
    """KV caches."""
    kept: int
    """What forwards leave for their backwards. It gives way to a call that takes more than `call`."""
    adapters: int
    """Clients' tensors, and as much again for what PEFT computes of their configurations."""
    call: int
    """What a call takes while it runs."""
    cache_tokens: int
    """Tokens of one row that `cache` holds."""
    max_length: int
    """Tokens that one session, or a row in training, may have: `cache` can hold them."""

    @classmethod
    def of(cls, free: int, token_bytes: int, cache_tokens: int | None, max_length: int, row_bytes: int = 0) -> "Budget":
        """For `free` bytes and `token_bytes` for each cached token; `cache_tokens`, if the user said how many.

        `row_bytes`: what it takes to train a row of `ROW` tokens, or of `max_length` if these are fewer; caches and
        adapters leave so much of the memory to calls and to what is kept, where they can.

        Raises `BadUsage` where the cache does not fit.
        """
        if cache_tokens is None:
            spare = max(int(free * (1 - _LEAST_ADAPTERS)) - row_bytes, min(ROW, max_length) * token_bytes)
            cache_tokens = max(1, min(int(free * _CACHE), spare) // token_bytes)
        tokens, cache = cache_tokens, cache_tokens * token_bytes
        if cache > free:
            raise BadUsage(
                f"There is no memory for a KV cache of {tokens:,} tokens: it would take {cache / 1e9:,.2f} GB, and "
                f"{free / 1e9:,.2f} GB are free; choose fewer (--cache-tokens), or serve fewer blocks."
            )
        rest = (free - cache) / (1 - _CACHE)
        kept, adapters = int(rest * _KEPT), int(rest * _ADAPTERS)
        adapters = min(adapters, max(free - cache - row_bytes, int(free * _LEAST_ADAPTERS)))
        return cls(cache, kept, adapters, free - cache - kept - adapters, tokens, min(max_length, tokens))

    def shares(self, free_tokens: int, kept: int, adapters: int) -> MemoryShares:
        """With what is used of it: all of the cache but `free_tokens`, and bytes."""
        cache = self.cache * (self.cache_tokens - free_tokens) // self.cache_tokens
        return MemoryShares(
            cache=Share(used=cache, total=self.cache),
            kept=Share(used=kept, total=self.kept),
            adapters=Share(used=adapters, total=self.adapters),
        )

    def describe(self) -> str:
        """A line for people."""
        return (
            f"memory: {self.cache / 1e9:,.2f} GB for KV caches of {self.cache_tokens:,} tokens, "
            f"{self.kept / 1e9:,.2f} GB for kept activations, {self.adapters / 1e9:,.2f} GB for adapters, "
            f"{self.call / 1e9:,.2f} GB for the call that runs; rows of up to {self.max_length:,} tokens"
        )


_MUCH = 0.1
"""Of a GPU's memory. What the driver itself needs for a process counts as others', too: some 0.3 GB."""


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a device, in bytes. What neither is free nor held by this process, others hold."""

    free: int
    total: int
    held: int

    @classmethod
    def of(cls, device: torch.device) -> "DeviceMemory":
        """As it is now."""
        host = psutil.virtual_memory()
        if device.type in ("cuda", "xpu"):
            module = torch.get_device_module(device)
            free, total = module.mem_get_info(device)
            return cls(int(free), int(total), int(module.memory_reserved(device)))
        if device.type == "mps":  # the host's memory, as much of it as Metal gives to one process
            total, held = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
            return cls(max(0, min(int(host.available), total - held)), total, held)
        return cls(int(host.available), int(host.total), int(psutil.Process().memory_info().rss))

    def within(self, limit: MemoryLimit | None) -> int:
        """Bytes that are free for this process, which may hold `limit`."""
        return self.free if limit is None else max(0, min(self.free, limit.of(self.total) - self.held))

    def others(self, device: torch.device) -> str:
        """A line for people if other programs hold much; a second peer is one of them. Of the CPU's nothing is said."""
        others = self.total - self.free - self.held
        if device.type == "cpu" or others < _MUCH * self.total:
            return ""
        return (
            f"other programs hold {others / 1e9:,.2f} of the {self.total / 1e9:,.2f} GB of {device}; should they take "
            "more, calls of this peer will fail, so leave them room (--memory)"
        )


def return_freed_memory() -> None:
    """Have Python, the C library and torch's allocator of a GPU give back what they hold.

    Module trees of adapters that are dropped refer to themselves, and Python looks for such at its leisure: 50
    trainings of small adapters leave 40 MB. Quantizing leaves a multiple of each block's size behind, and a training
    call what its activations took: 2.8 GB of 3.6, after steps of 8 x 256 tokens over 30 blocks of SmolLM2-135M.
    """
    gc.collect()
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            module.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
