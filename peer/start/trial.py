"""What the trials of a span have in common: random inputs, how results are compared, and on which blocks."""

import logging
from collections.abc import Callable
from math import inf

import torch

from peer.span.block_types import blocks_of_each_type
from peer.span.span import Mode, Span
from protocol.errors import first_line

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
_ROUGH = 5e-2
"""For 16-bit and quantized weights: the kernels for one row and for several round differently."""


def tolerance(span: Span) -> float:
    """By how much, relative to the largest value, results may differ that are computed in another order."""
    is_quantized = getattr(span.model, "is_quantized", False)
    return _ROUGH if is_quantized else _TOLERANCE.get(span.dtype, _ROUGH)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value; infinite where either is no number."""
    difference = found.to(expected.device) - expected
    return float((difference.abs().max() / expected.abs().max()).nan_to_num(inf))


def random_states(span: Span, rows: int, tokens: int, chance: torch.Generator) -> torch.Tensor:
    """Hidden states (rows, tokens, hidden size), on the span's device and of its dtype."""
    return torch.randn(rows, tokens, span.hidden_size, generator=chance).to(span.device, span.dtype)


def holds(
    span: Span, refusal: str, error_of: Callable[[Mode], float], at_most: float, level: int = logging.INFO
) -> bool:
    """Whether `error_of`, which runs one block, is at most so large for one block of each type.

    If not, the log says so at `level`, in a line that begins with `refusal`. That `error_of` raises is a refusal, too.
    """
    for block in blocks_of_each_type(span):
        try:
            error = error_of(Mode(range(block, block + 1)))
        except Exception as failure:  # any failure at all: this architecture does something that was not foreseen
            logger.log(level, "%s: %s", refusal, first_line(failure))
            return False
        if not error <= at_most:
            logger.log(level, "%s: block %d differs by %.1e", refusal, block, error)
            return False
    return True
