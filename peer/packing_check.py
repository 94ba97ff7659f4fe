"""Whether packed calls give what a span gives session by session: tried out when a span is loaded."""

import logging
from collections.abc import Sequence
from itertools import accumulate
from math import inf, isnan

import torch

from peer.kinds import blocks_of_each_kind
from peer.kv_cache import SpanCache
from peer.packing import Packer, Part
from peer.span import Inputs, Mode, Span
from protocol.errors import first_line

logger = logging.getLogger(__name__)

_LAYERS = {"full_attention", "sliding_attention"}
"""Others keep state beside keys and values, or draw masks from the whole batch's padding (Llama 4's chunks)."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
_ROUGH = 5e-2
"""Of 16-bit and quantized weights: the kernels for one row and for several round differently."""


@torch.no_grad()
def can_pack(span: Span) -> bool:
    """Run three short steps of two sequences packed and alone, on one block of each kind, and compare."""
    if reason := _known_obstacle(span):
        logger.info("sessions are not joined: %s", reason)
        return False
    packer = Packer(span)
    for block in blocks_of_each_kind(span):
        try:
            error = _difference(span, packer, Mode(range(block, block + 1)))
        except Exception as failure:  # any failure at all: this architecture does something else with masks or caches
            logger.info("sessions are not joined: %s", first_line(failure))
            return False
        if not error <= _tolerance(span):
            logger.info("sessions are not joined: together block %d differs by %.1e", block, error)
            return False
    return True


def _known_obstacle(span: Span) -> str:
    """What so short sequences would not show."""
    others = set(getattr(span.model.config, "layer_types", None) or ()) - _LAYERS
    if others:
        return f"layers of {min(others)}"
    for module in span.model.modules():
        found = getattr(module, "rope_type", None)
        for kind in found.values() if isinstance(found, dict) else [found]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return f"{kind} rotary embeddings are those of the longest sequence"
    return "" if span.takes_positions else "the trunk takes no positions"


def _tolerance(span: Span) -> float:
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


def _difference(span: Span, packer: Packer, mode: Mode) -> float:
    """The worst relative error of a prefill and a decode packed, and of a decode alone on top of these."""
    sequences = [_Sequence(span, mode, 2, (3, 1, 1), padding=1), _Sequence(span, mode, 1, (2, 2, 1), padding=0)]
    errors = []
    for step in range(2):
        parts = [Part(sequence.inputs[step], sequence.cache) for sequence in sequences]
        outputs = packer.run(packer.pack(parts), mode)
        for sequence, part, output in zip(sequences, parts, outputs, strict=True):
            if part.error:
                raise part.error
            errors.append(sequence.error(step, output))
    for sequence in sequences:
        errors.append(sequence.error(2, span.run(sequence.inputs[2], mode, sequence.cache)))
    return max(errors, key=lambda error: inf if isnan(error) else error)
