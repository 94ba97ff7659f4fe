"""A peer's KV arena, if its span computes the same with it: tried when the span is loaded."""

import logging

import torch

from peer.kv_cache.arena import Arena
from peer.kv_cache.slots import Run
from peer.kv_cache.span_cache import SpanCache
from peer.span.span import Inputs, Mode, Span
from peer.start.trial import holds, random_states, relative_error, tolerance
from protocol.errors import BadUsage

_STEPS = ((1, 9), (1, 1)), ((2, 5), (2, 1))
"""Two sessions: rows and tokens of their steps."""
_SLOTS = 64


@torch.no_grad()
def arena_for(span: Span, slots: int) -> Arena:
    """An arena of `slots` tokens for all of a span's blocks; for none, if the span then computes something else.

    Attention kernels may round differently where keys lie in another way, and a model's code may not take views. A
    GPU's are chosen by how tensors lie, and round no worse one way than the other; a CPU's give the same bits.
    Raises `BadUsage` where there is not so much memory.
    """
    at_most = 0.0 if span.device.type == "cpu" else tolerance(span)
    refusal = "the KV cache is not kept in an arena, so each step copies its session's keys and values"
    is_right = holds(span, refusal, lambda mode: _error(span, mode), at_most, logging.WARNING)
    shapes = span.kv_shapes if is_right else {}
    try:
        return Arena(slots, shapes, span.device)
    except (OSError, OverflowError, ValueError, torch.OutOfMemoryError) as error:
        raise BadUsage(
            f"There is no memory for a KV cache of {slots:,} tokens; choose fewer (--cache-tokens)."
        ) from error


def _error(span: Span, mode: Mode) -> float:
    """The largest relative error of two sessions' steps whose keys and values lie in an arena."""
    arena = Arena(_SLOTS, {i: span.kv_shapes[i] for i in mode.blocks if i in span.kv_shapes}, span.device)
    chance, errors = torch.Generator().manual_seed(0), []
    for steps in _STEPS:
        plain, ours = (SpanCache(span.config, mode.blocks) for _ in range(2))
        ours.move_into(arena, Run(3, _SLOTS - 5))
        for rows, tokens in steps:
            inputs = Inputs(random_states(span, rows, tokens, chance))
            expected = span.run(inputs, mode, plain)
            plain.seen = ours.seen = plain.seen + tokens
            errors.append(relative_error(span.run(inputs, mode, ours), expected))
    return max(errors)
