"""A CPU with as little memory as a GPU: torch's tensors are counted, and allocations over a limit fail."""

from math import inf

import torch

from peer.training.allocated import Allocated

_NEGLIGIBLE = 4096
"""Bytes of a storage that is never refused."""


class ScarceMemory(Allocated):
    """An operation whose result brings what is taken over `limit` raises `torch.OutOfMemoryError`, as a GPU's does."""

    def __init__(self) -> None:
        super().__init__()
        self.limit, self.peak, self.refused = inf, 0, 0

    def check(self, largest: int) -> None:
        if self.taken > self.limit and largest > _NEGLIGIBLE:
            self.refused += 1
            raise torch.OutOfMemoryError(f"There would be {self.taken} bytes taken of {self.limit}.")
        self.peak = max(self.peak, self.taken)
