"""Which joint calls give what a span gives session by session: tried out when a span is loaded."""

import logging
from collections.abc import Sequence
from itertools import accumulate
from math import inf, isnan

import torch

from peer.generation.joined.call import Joiner, JointCall, Part
from peer.generation.joined.lockstep import Lockstep
from peer.generation.joined.packing import Packer
from peer.kv_cache.span_cache import SpanCache
from peer.span.rotary import rope_types
from peer.span.span import Inputs, Mode, Span
from peer.start.block_kinds import blocks_of_each_kind
from protocol.errors import first_line

logger = logging.getLogger(__name__)

_LAYERS = {"full_attention", "sliding_attention"}
"""Others keep state beside keys and values, or draw masks from the whole batch's padding (Llama 4's chunks)."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
_ROUGH = 5e-2
"""Of 16-bit and quantized weights: the kernels for one row and for several round differently."""


@torch.no_grad()
def find_joiner(span: Span) -> Joiner | None:
    """The quickest way to run joint calls on a span that is right; `None`: its sessions have to step alone."""
    if reason := _known_obstacle(span):
        logger.info("sessions are not packed: %s", reason)
    elif _is_right(span, packer := Packer(span)):
        return packer
    return lockstep if _is_right(span, lockstep := Lockstep(span)) else None


def _is_right(span: Span, joiner: Joiner) -> bool:
    """Run three short steps of two sequences together and alone, on one block of each kind, and compare."""
    way = type(joiner).__name__
    for block in blocks_of_each_kind(span):
        try:
            error = _difference(span, joiner, Mode(range(block, block + 1)))
        except Exception as failure:  # any failure at all: this architecture does something else than was thought of
            logger.info("sessions are not joined by %s: %s", way, first_line(failure))
            return False
        if not error <= tolerance(span):
            logger.info("sessions are not joined by %s: together block %d differs by %.1e", way, block, error)
            return False
    return True


def _known_obstacle(span: Span) -> str:
    """To packing; what so short sequences would not show."""
    others = set(getattr(span.model.config, "layer_types", None) or ()) - _LAYERS
    if others:
        return f"layers of {min(others)}"
    for module in span.model.modules():
        for kind in rope_types(module).values():
            if "dynamic" in kind or kind == "longrope":
                return f"{kind} rotary embeddings are those of the longest sequence"
    return "" if span.takes_positions else "the trunk takes no positions"


def tolerance(span: Span) -> float:
    """By how much, relative to the largest value, results may differ that are computed in another order."""
    is_quantized = getattr(span.model, "is_quantized", False)
    return _ROUGH if is_quantized else _TOLERANCE.get(span.dtype, _ROUGH)


class _Sequence:
    """A few random tokens in steps, maybe padded at the left in the first row."""

    def __init__(self, span: Span, mode: Mode, rows: int, steps: Sequence[int], padding: int):
        chance = torch.Generator().manual_seed(rows)
        hidden = [torch.randn(rows, tokens, span.hidden_size, generator=chance) for tokens in steps]
        mask = torch.ones(rows, sum(steps), dtype=torch.long)
        mask[0, :padding] = 0
        ends = accumulate(steps)
        self._padding = padding
        self.inputs = [
            Inputs(states.to(span.device, span.dtype), mask[:, :end] if padding else None)
            for states, end in zip(hidden, ends, strict=True)
        ]
        alone = SpanCache(span.model.config, mode.blocks)
        self._expected = [span.run(inputs, mode, alone) for inputs in self.inputs]
        self.cache = SpanCache(span.model.config, mode.blocks)

    def error(self, step: int, found: torch.Tensor) -> float:
        """The largest difference from what is expected, relative to the largest value."""
        start = self._padding if step == 0 else 0
        expected = self._expected[step][:, start:]
        difference = found[:, start:].to(expected.device) - expected
        return float(difference.abs().max() / expected.abs().max())


def _difference(span: Span, joiner: Joiner, mode: Mode) -> float:
    """The worst relative error of a prefill and a decode together, and of a decode alone on top of these."""
    sequences = [_Sequence(span, mode, 2, (3, 1, 1), padding=1), _Sequence(span, mode, 1, (2, 2, 1), padding=0)]
    errors = []
    for step in range(2):
        parts = [Part(sequence.inputs[step], sequence.cache) for sequence in sequences]
        outputs = joiner.run(JointCall(parts), mode)
        for sequence, part, output in zip(sequences, parts, outputs, strict=True):
            if part.error:
                raise part.error
            errors.append(sequence.error(step, output))
    for sequence in sequences:
        errors.append(sequence.error(2, span.run(sequence.inputs[2], mode, sequence.cache)))
    return max(errors, key=lambda error: inf if isnan(error) else error)
