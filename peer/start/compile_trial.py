"""TODO."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config

from peer.generation.joined.call import JointCall, Part
from peer.generation.joined.compiled import CompiledPacker
from peer.generation.joined.packing import Packer
from peer.kv_cache.span_cache import SpanCache
from peer.span.span import (
    Inputs,
    Mode,
    Span,
)
from peer.start.joining_trial import tolerance
from protocol.errors import first_line

logger = logging.getLogger(__name__)

_PAYS = 1.02
"""How many times as fast a step must be."""


_ROUNDS = 10


@torch.no_grad()
def compile_steps(span: Span, backend: str = "inductor") -> CompiledPacker | None:
    """A packer of compiled steps, if they give what the span gives, and sooner. Takes half a minute, or minutes."""
    compiled = CompiledPacker(span, backend)
    try:
        with _settings():
            error, gain = _try_out(span, Packer(span), compiled)
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


def _try_out(span: Span, plain: Packer, compiled: CompiledPacker) -> tuple[float, float]:
    """The largest relative difference of a few steps, and how many times as fast a step of one token is."""
    mode, chance = Mode(span.blocks), torch.Generator().manual_seed(0)
    caches = {packer: SpanCache(span.model.config, span.blocks) for packer in (plain, compiled)}

    def step(packer: Packer, hidden: torch.Tensor) -> torch.Tensor:
        (found,) = packer.run(JointCall([Part(Inputs(hidden), caches[packer])]), mode)
        caches[packer].seen += hidden.shape[1]
        return found

    worst, times = 0.0, dict[Packer, list[float]]({plain: [], compiled: []})
    for number, tokens in enumerate([5, 1, 3] + [1] * _ROUNDS):
        hidden = torch.randn(1, tokens, span.hidden_size, generator=chance).to(span.device, span.dtype)
        found = {}
        for packer in (plain, compiled):
            begin = time.perf_counter()
            found[packer] = step(packer, hidden)
            times[packer].append(time.perf_counter() - begin)
        error = (found[compiled] - found[plain]).abs().max() / found[plain].abs().max()
        worst = max(worst, float(error.nan_to_num(float("inf"))))
        if number == 0:
            compiled.compile()
    fastest = {packer: min(taken[-_ROUNDS:]) for packer, taken in times.items()}
    return worst, fastest[plain] / fastest[compiled]
