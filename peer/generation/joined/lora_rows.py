"""Different clients' LoRA in one batched pass: the base runs once, each client's tokens get a delta of their own.

Where all have one rank and as many tokens each, their deltas are two grouped products (as in Punica, Chen et al. 2023,
and S-LoRA, Sheng et al. 2023), else two small products per client.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from peer.adapters.lora import Delta, Lora
from peer.generation.joined.lockstep import place_apart
from peer.span.span import Span
from protocol.model.forwards import Forward, replaced

_KEPT_SETS = 4
"""Sets of adapters whose stacked copies are kept."""


@dataclass(frozen=True)
class Segment:
    """The tokens [start, end) of a pass's row, which run with one adapter."""

    start: int
    end: int
    lora: Lora


@dataclass(frozen=True)
class _Stack:
    """The deltas of several segments of equal length, for grouped products."""

    a: torch.Tensor
    """(segments, in, rank)."""
    b: torch.Tensor
    """(segments, rank, out)."""
    scaling: torch.Tensor
    """(segments, 1, 1)."""

    def of(self, inputs: torch.Tensor) -> torch.Tensor:
        """(tokens, out) of inputs (tokens, in)."""
        grouped = inputs.to(self.a.dtype).reshape(len(self.a), -1, inputs.shape[1])
        return (grouped @ self.a @ self.b * self.scaling).flatten(0, 1)


class LoraApplier:
    """Adds segments' deltas to a span's own linear layers during a pass."""

    def __init__(self, span: Span):
        self._span = span
        self._stacks = OrderedDict[tuple[Lora, ...], dict[str, _Stack | None]]()
        """Set of adapters -> module -> its stacked deltas; of the sets that were run last."""

    @contextmanager
    def applied(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within the block the span's modules give what they give with these segments' adapters."""
        stacks = self._stacks_of(tuple(segment.lora for segment in segments))
        is_even = len({segment.end - segment.start for segment in segments}) == 1
        blocks = self._span.where.of(self._span.model)
        with ExitStack() as stack:
            for name in {name: None for segment in segments for name in segment.lora.deltas}:
                own = [segment for segment in segments if name in segment.lora.deltas]
                stacked = stacks.get(name) if is_even and len(own) == len(segments) else None
                add = partial(_add_stack, stacked) if stacked else partial(_add_each, name)
                make = partial(_adding, own, add, partial(_add_each, name))
                stack.enter_context(replaced([blocks.get_submodule(name)], make))
            yield

    def _stacks_of(self, loras: tuple[Lora, ...]) -> dict[str, _Stack | None]:
        """What has been stacked for this set. The copies are made when a set comes for the second time."""
        if loras not in self._stacks:
            self._stacks[loras] = {}
            if len(self._stacks) > _KEPT_SETS:
                self._stacks.popitem(last=False)
            return {}
        self._stacks.move_to_end(loras)
        if not self._stacks[loras]:
            names = set.intersection(*(set(lora.deltas) for lora in loras))
            self._stacks[loras] = {name: _stack([lora.deltas[name] for lora in loras]) for name in names}
        return self._stacks[loras]


def _stack(deltas: Sequence[Sequence[Delta]]) -> _Stack | None:
    """`None` where the deltas do not fit together."""
    first = [each[0] for each in deltas]
    if any(len(each) > 1 for each in deltas) or len({(delta.a.shape, delta.a.dtype) for delta in first}) > 1:
        return None
    scaling = torch.tensor([delta.scaling for delta in first], dtype=first[0].a.dtype, device=first[0].a.device)
    a, b = torch.stack([delta.a.T for delta in first]), torch.stack([delta.b.T for delta in first])
    return _Stack(a, b, scaling[:, None, None])


_Add = Callable[[Sequence[Segment], torch.Tensor, torch.Tensor], torch.Tensor]
"""Adds segments' deltas to a module's output, given its inputs too."""


def _adding(segments: Sequence[Segment], add: _Add, add_each: _Add, _: nn.Module, forward: Forward) -> Forward:
    """A module's forward with the deltas of the row's segments, or of the one part for which it is run apart."""

    def run(inputs: torch.Tensor) -> torch.Tensor:
        output = forward(inputs)
        if (place := place_apart()) is None:
            return add(segments, inputs, output)
        tokens = inputs.shape[:-1].numel()
        own = [Segment(0, tokens, segment.lora) for segment in segments if segment.start <= place < segment.end]
        return add_each(own, inputs, output) if own else output

    return run


def _rows(segments: Sequence[Segment], given: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a module, a token a row."""
    inputs, outputs = given.flatten(0, -2), output.flatten(0, -2)
    if len(inputs) < segments[-1].end:
        raise RuntimeError(f"A module with an adapter got {len(inputs)} tokens of {segments[-1].end}")
    return inputs, outputs


def _add_each(name: str, segments: Sequence[Segment], given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    inputs, outputs = _rows(segments, given, output)
    for segment in segments:
        own = slice(segment.start, segment.end)
        for delta in segment.lora.deltas[name]:
            outputs[own] += delta.of(inputs[own])
    return outputs.view_as(output)


def _add_stack(stack: _Stack, segments: Sequence[Segment], given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    inputs, outputs = _rows(segments, given, output)
    own = slice(segments[0].start, segments[-1].end)
    outputs[own] += stack.of(inputs[own])
    return outputs.view_as(output)
