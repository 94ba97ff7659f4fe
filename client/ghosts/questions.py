"""What may be asked about weights on remote peers, and in which terms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from protocol.errors import SwarmError


class RemoteWeightError(SwarmError, RuntimeError):
    """Something was computed with a weight that is not on this machine."""


@dataclass(frozen=True, eq=False)
class Subtracted:
    """The product that PiSSA or OLoRA subtracted from a weight: here the weight is `W - b @ a`, while peers hold W.

    Never changed in place.
    """

    b: torch.Tensor
    """(rows, rank), float32."""
    a: torch.Tensor
    """(rank, columns), float32."""


@dataclass(frozen=True)
class Weight:
    """A matrix on remote peers, as this machine's ghost of it is: transposed or not, less what was subtracted."""

    name: str
    """`BLOCK.PATH.weight`."""
    transposed: bool
    subtracted: Subtracted | None
    """From the matrix as the peers hold it, not transposed."""


NormReader = Callable[[str, bool, tuple[int, ...], torch.dtype], torch.Tensor]
"""(`BLOCK.PATH.weight`, transposed, dimensions, dtype) -> 2-norms over these dimensions."""


class FactorReader(Protocol):
    """Asks peers for factors of their weights; all in float32. Raises `SwarmError` when they do not give them."""

    def svd(self, weight: Weight, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """U (rows, k), S (k,) and Vh (k, columns); only a leading part of each can be had, by slicing."""

    def qr(self, weight: Weight, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """Q (rows, k) and R (k, columns); only a leading part of each can be had, by slicing."""

    def svd_lowrank(self, weight: Weight, shape: torch.Size, rank: int, iterations: int) -> tuple[torch.Tensor, ...]:
        """U (rows, rank), S (rank,) and V (columns, rank), as `torch.svd_lowrank` finds them."""

    def subtract(self, weight: Weight, part: torch.Tensor) -> Subtracted:
        """What is subtracted from `weight` once `part` is, too.

        `part` is a product of the factors of `weight` that were read last; raises `RemoteWeightError` for any other.
        """


@dataclass(frozen=True)
class WeightReader:
    """What may be asked about remote weights."""

    norm: NormReader
    factors: FactorReader
