"""Compiled steps, if they give what a span gives, and sooner: tried when a span is loaded with `--compile`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config

from peer.generation.joined.batched_pass import BatchedPass, BatchMember
from peer.generation.joined.compiled import CompiledPacker
from peer.generation.joined.packing import Packer
from peer.kv_cache.span_cache import SpanCache
from peer.span.span import Inputs, Mode, Span
from peer.start.trial import random_states, relative_error, tolerance
from protocol.errors import first_line
from protocol.machine.timing import fastest

logger = logging.getLogger(__name__)

_PAYS = 1.02
"""How many times as fast a step must be."""
_STEPS = (5, 1, 3, 1)
"""Tokens of the steps whose results are compared. During the first one, blocks run as they are."""


@torch.no_grad()
def compile_steps(span: Span, backend: str = "inductor") -> CompiledPacker | None:
    """A packer of compiled steps, if they give what the span gives, and sooner. Takes half a minute, or minutes."""
    compiled = CompiledPacker(span, backend)
    try:
        with _settings():
            error, gain = _try_out(span, compiled)
    except Exception as failure:  # any failure at all: no compiler, or a block that it cannot take
        logger.warning("steps are not compiled: %s", first_line(failure))
        return None
    if not error <= tolerance(span) or gain < _PAYS:
        logger.warning("steps are not compiled: they differ by %.1e and are %.2f times as fast", error, gain)
        return None
    logger.info("steps are compiled: %.2f times as fast", gain)
    return compiled


@contextmanager
def _settings() -> Iterator[None]:
    # Otherwise a block's number would be part of its graph, and each block have its own. And CUDA graphs are for single
    # tokens: each further number of them would be recorded, and keep memory, while clients wait.
    dynamo = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)  # type: ignore[attr-defined]
    with dynamo, torch._inductor.config.patch({"triton.cudagraph_skip_dynamic_graphs": True}):
        yield


class _Session:
    """A session whose steps one packer runs."""

    def __init__(self, span: Span, packer: Packer):
        self._packer, self._mode = packer, Mode(span.blocks)
        self._cache = SpanCache(span.config, span.blocks)

    def step(self, hidden: torch.Tensor) -> torch.Tensor:
        (found,) = self._packer.run(BatchedPass([BatchMember(Inputs(hidden), self._cache)]), self._mode)
        self._cache.seen += hidden.shape[1]
        return found


def _try_out(span: Span, compiled: CompiledPacker) -> tuple[float, float]:
    """The largest relative error of a few steps, and how many times as fast a step of one token is."""
    plain, ours = _Session(span, Packer(span)), _Session(span, compiled)
    chance, errors = torch.Generator().manual_seed(0), []
    for number, tokens in enumerate(_STEPS):
        hidden = random_states(span, 1, tokens, chance)
        errors.append(relative_error(ours.step(hidden), plain.step(hidden)))
        if number == 0:
            compiled.compile()
    token = random_states(span, 1, 1, chance)
    seconds = [fastest(lambda session=session: session.step(token)) for session in (plain, ours)]  # type: ignore[misc]
    return max(errors), seconds[0] / seconds[1]
