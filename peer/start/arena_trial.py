"""A peer's KV arena, if its span computes the same with it: tried when the span is loaded."""

import logging

import torch

from peer.kv_cache.arena import Arena
from peer.kv_cache.slots import Run
from peer.kv_cache.span_cache import SpanCache
from peer.span.span import Inputs, Mode, Span
from peer.start.block_kinds import blocks_of_each_kind
from protocol.errors import BadUsage

logger = logging.getLogger(__name__)

_STEPS = ((1, 9), (1, 1)), ((2, 5), (2, 1))
"""Two sessions: rows and tokens of their steps."""
_SLOTS = 64


def arena_for(span: Span, slots: int) -> Arena:
    """An arena of `slots` tokens for all of a span's blocks; for none, if the span then computes something else.

    Attention kernels may round differently where keys lie in another way, and a model's code may not take views.
    Raises `BadUsage` where there is not so much memory.
    """
    is_exact = all(_is_exact(span, block) for block in blocks_of_each_kind(span))
    shapes = span.kv_shapes if is_exact else {}
    try:
        return Arena(slots, shapes, span.device)
    except (OSError, OverflowError, ValueError, torch.OutOfMemoryError) as error:
        raise BadUsage(
            f"There is no memory for a KV cache of {slots:,} tokens; choose fewer (--cache-tokens)."
        ) from error


@torch.no_grad()
def _is_exact(span: Span, block: int) -> bool:
    mode = Mode(range(block, block + 1))
    shapes = {block: span.kv_shapes[block]} if block in span.kv_shapes else {}
    arena = Arena(_SLOTS, shapes, span.device)
    for steps in _STEPS:
        plain, ours = (SpanCache(span.model.config, mode.blocks) for _ in range(2))
        ours.move_into(arena, Run(3, _SLOTS - 5))
        for rows, tokens in steps:
            hidden = torch.randn(rows, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
            expected = span.run(Inputs(hidden), mode, plain)
            plain.seen = ours.seen = plain.seen + tokens
            try:
                found = span.run(Inputs(hidden), mode, ours)
            except Exception as error:  # any failure at all: this model's code needs Transformers' own layers
                logger.info("the KV cache is not kept in an arena: %s", error)
                return False
            if not torch.equal(found, expected):
                logger.info("the KV cache is not kept in an arena: the results differ")
                return False
    return True
