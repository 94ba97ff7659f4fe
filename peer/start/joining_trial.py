"""The quickest way of batched passes that gives what a span gives session by session: tried when a span is loaded."""

import logging
from collections.abc import Sequence
from itertools import accumulate

import torch

from peer.generation.joined.batched_pass import BatchedPass, BatchMember, Joiner
from peer.generation.joined.lockstep import Lockstep
from peer.generation.joined.packing import Packer
from peer.kv_cache.span_cache import SpanCache
from peer.span.rotary import rope_types
from peer.span.span import Inputs, Mode, Span
from peer.start.trial import holds, random_states, relative_error, tolerance

logger = logging.getLogger(__name__)

_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers that can be packed. Others keep state beside keys and values, or draw masks from the whole batch's
padding (Llama 4's chunks)."""


@torch.no_grad()
def find_joiner(span: Span) -> Joiner | None:
    """The quickest way to run batched passes on a span that is right; `None`: its sessions have to step alone."""
    if reason := _known_obstacle(span):
        logger.info("sessions are not packed: %s", reason)
    elif _is_right(span, packer := Packer(span)):
        return packer
    return lockstep if _is_right(span, lockstep := Lockstep(span)) else None


def _is_right(span: Span, joiner: Joiner) -> bool:
    refusal = f"sessions are not joined by {type(joiner).__name__}"
    return holds(span, refusal, lambda mode: _error(span, joiner, mode), tolerance(span))


def _known_obstacle(span: Span) -> str:
    """Why a span cannot be packed, where sequences as short as those of the trial would not show it."""
    others = set(getattr(span.config, "layer_types", None) or ()) - _LAYERS
    if others:
        return f"layers of {min(others)}"
    for module in span.model.modules():
        for rope_type in rope_types(module).values():
            if "dynamic" in rope_type or rope_type == "longrope":
                return f"{rope_type} rotary embeddings are those of the longest sequence"
    return "" if span.takes_positions else "the trunk takes no positions"


class _Sequence:
    """A few random tokens in steps, maybe padded at the left in the first row."""

    def __init__(self, span: Span, mode: Mode, rows: int, steps: Sequence[int], padding: int):
        chance = torch.Generator().manual_seed(rows)
        hidden = [random_states(span, rows, tokens, chance) for tokens in steps]
        mask = torch.ones(rows, sum(steps), dtype=torch.long)
        mask[0, :padding] = 0
        ends = accumulate(steps)
        self._padding = padding
        self.inputs = [
            Inputs(states, mask[:, :end] if padding else None) for states, end in zip(hidden, ends, strict=True)
        ]
        alone = SpanCache(span.config, mode.blocks)
        self._expected = [span.run(inputs, mode, alone) for inputs in self.inputs]
        self.cache = SpanCache(span.config, mode.blocks)

    def error(self, step: int, found: torch.Tensor) -> float:
        """The relative error of what a step gave, but for the padding."""
        start = self._padding if step == 0 else 0
        return relative_error(found[:, start:], self._expected[step][:, start:])


def _error(span: Span, joiner: Joiner, mode: Mode) -> float:
    """The worst relative error of a prefill and a decode together, and of a decode alone on top of these."""
    sequences = [_Sequence(span, mode, 2, (3, 1, 1), padding=1), _Sequence(span, mode, 1, (2, 2, 1), padding=0)]
    errors = []
    for step in range(2):
        members = [BatchMember(sequence.inputs[step], sequence.cache) for sequence in sequences]
        outputs = joiner.run(BatchedPass(members), mode)
        for sequence, member, output in zip(sequences, members, outputs, strict=True):
            if member.error:
                raise member.error
            errors.append(sequence.error(step, output))
    for sequence in sequences:
        errors.append(sequence.error(2, span.run(sequence.inputs[2], mode, sequence.cache)))
    return max(errors)
