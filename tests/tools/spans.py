"""Spans that tests load into their own process, what to run on them, and how to compare the results."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

START, END, WIDTH = 1, 4, 32
"""The blocks [START, END) of a small model are a span; WIDTH is its hidden size."""


def states(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """Hidden states, (rows, tokens, WIDTH)."""
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: Iterable[Any], theirs: Iterable[Any]) -> None:
    """Tensors, or tensors by name, are equal to 1e-5 of the largest value."""
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, Mapping):
            assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
            assert_same(mine.values(), [other[name] for name in mine])
        else:
            assert isinstance(mine, torch.Tensor), mine
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * float(other.abs().max()))
