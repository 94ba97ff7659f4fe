"""How much memory torch's operations hold, on any device."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocated(TorchDispatchMode):
    """Within the block, on this thread, `taken` is the bytes of all storages that were made and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0
        self.history: list[int] = []
        """What was taken after each operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = {storage._cdata: storage for storage in _storages(result) if storage._cdata not in given}
        for storage in made.values():
            self.taken += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.check(max((storage.nbytes() for storage in made.values()), default=0))
        self.history.append(self.taken)
        return result

    def check(self, largest: int) -> None:
        """Called after each operation, the largest storage that it made having so many bytes. May raise."""

    def _free(self, size: int) -> None:
        self.taken -= size


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a value that is made of tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in tensors_in(value))
