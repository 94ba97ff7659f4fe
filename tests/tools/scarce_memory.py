"""A CPU with as little memory as a GPU: torch's tensors are counted, and allocations over a limit fail."""

import weakref
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NEGLIGIBLE = 4096
"""Bytes of a storage that is never refused."""


class ScarceMemory(TorchDispatchMode):
    """Within the block, on this thread, `taken` is the bytes of all storages that were made and are alive.

    An operation whose result brings them over `limit` raises `torch.OutOfMemoryError`, as a GPU's allocator does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.taken, self.peak, self.refused = inf, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = {storage._cdata: storage for storage in _storages(result) if storage._cdata not in given}
        for storage in made.values():
            self.taken += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        if self.taken > self.limit and any(storage.nbytes() > _NEGLIGIBLE for storage in made.values()):
            self.refused += 1
            raise torch.OutOfMemoryError(f"There would be {self.taken} bytes taken of {self.limit}.")
        self.peak = max(self.peak, self.taken)
        return result

    def _free(self, size: int) -> None:
        self.taken -= size


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _storages(part)
