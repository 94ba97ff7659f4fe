"""What a training call will take: foreseen, from what small calls of its kind were seen to keep for their backwards."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peer.adapters.store import AdapterStore
from peer.span.block_types import block_types
from peer.span.span import Inputs, Mode, Span
from peer.training.call import TrainingCall
from protocol.tensors import prefix_tokens

_ROWS, _TOKENS = 2, 32
"""Measured is with two rows, as what is a view of one may be a copy of several, and at one, two and three times so many
tokens: attention kernels round lengths up to this."""
_MOST_KINDS = 64


@dataclass(frozen=True)
class Growth:
    """Bytes that a block keeps of a row of t tokens: constant + linear * t + square * t**2.

    Attention keeps its probabilities where no fused kernel computes it (ALiBi, soft caps), and masks: squares.
    """

    constant: float
    linear: float
    square: float

    @classmethod
    def through(cls, rows: int, tokens: int, first: int, second: int, third: int) -> "Growth":
        """From the bytes of so many rows of one, two and three times so many tokens."""
        square = (third - 2 * second + first) / (2 * tokens**2)
        linear = (second - first) / tokens - 3 * tokens * square
        return cls(first - linear * tokens - square * tokens**2, linear / rows, square / rows)

    def at(self, rows: int, tokens: int) -> int:
        """Bytes, for so many rows of so many tokens."""
        return max(0, round(self.constant + rows * (self.linear * tokens + self.square * tokens**2)))


@dataclass(frozen=True)
class _Kind:
    """Calls that keep as much for each token: of one module tree, run in one way."""

    types: dict[int, int]
    """Block -> the first one of its type."""
    growth: dict[int, Growth] = field(default_factory=dict)
    """The first block of a type -> what it keeps."""


class Footprint:
    """Foresees the bytes of activations that calls keep, without their inputs' own.

    `measure`: runs a small call and returns the bytes of the graph that it makes. It is called three times for each
    kind of calls and type of blocks, when the first such call comes: this belongs on the compute thread.
    """

    def __init__(self, span: Span, adapters: AdapterStore, measure: Callable[[TrainingCall], int]):
        self._span, self._adapters, self._measure = span, adapters, measure
        self._kinds: dict[Any, _Kind] = {}
        self._dequantized = max((_dequantized_bytes(module, span) for module in span.model.modules()), default=0)

    def of(self, call: TrainingCall) -> int:
        """Bytes that a call's autograd graph will keep."""
        return sum(self._blocks(call))

    def of_run(self, call: TrainingCall) -> int:
        """Bytes that it takes as a whole while it runs: its graph, and what comes and goes in one block."""
        blocks = list(self._blocks(call))
        return sum(blocks) + _passing(max(blocks), self._dequantized)

    def of_checkpoints(self, call: TrainingCall) -> int:
        """Bytes that it takes at least: the hidden states between blocks, and one block at a time."""
        return least_bytes(call.inputs.hidden.nbytes, len(call.mode.blocks), max(self._blocks(call)), self._dequantized)

    def of_row(self, tokens: int) -> int:
        """Bytes that one row of so many tokens takes at least, with LoRA and dropout on all linear layers."""
        least = self.of_checkpoints(plain_call(self._span, 1, tokens))
        return least + lora_bytes(tokens, _linear_inputs(self._span), self._span.dtype.itemsize)

    def _blocks(self, call: TrainingCall) -> Iterable[int]:
        kind, mode = self._kind(call), call.mode
        rows, tokens = call.inputs.hidden.shape[:2]
        for block in mode.blocks:
            first = kind.types[block]
            if first not in kind.growth:
                sizes = (self._measure(self._small(call, first, number)) for number in (1, 2, 3))
                kind.growth[first] = Growth.through(_ROWS, _TOKENS, *sizes)
            yield kind.growth[first].at(rows, tokens + prefix_tokens(call.prefix))

    def _kind(self, call: TrainingCall) -> _Kind:
        mode, adapter, model = call.mode, call.adapter, self._span.model
        own = (adapter.tree_key, len(adapter.manifest.trainable)) if adapter else None
        key = own, mode.training, mode.autocast, call.inputs.mask is None
        if key not in self._kinds:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            if adapter:
                model = self._adapters.adapt(adapter, adapter.tensors).model
            self._kinds[key] = _Kind(block_types(self._span, model))
        return self._kinds[key]

    def _small(self, call: TrainingCall, block: int, number: int) -> TrainingCall:
        span, tokens = self._span, number * _TOKENS
        hidden = torch.ones(_ROWS, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
        mask = None if call.inputs.mask is None else (torch.arange(tokens) > 0).long().repeat(_ROWS, 1)
        mode = replace(call.mode, blocks=range(block, block + 1), dropout_seed=0)
        return TrainingCall(Inputs(hidden, mask), mode, call.adapter, {})


def least_bytes(states: int, blocks: int, graph: int, dequantized: int) -> int:
    """Bytes that a call takes whose blocks are computed again one by one.

    `states`: bytes of its hidden states; `graph`: of what one block keeps; `dequantized`: of the largest quantized
    weight, as floats.
    """
    return states * (blocks + 1) + graph + _passing(graph, dequantized)


def lora_bytes(tokens: int, linear_inputs: int, itemsize: int) -> int:
    """What LoRA with dropout on all linear layers of a block, into which so many numbers go, adds to that at most."""
    return 2 * tokens * linear_inputs * (itemsize + 1)


def _passing(graph: int, dequantized: int) -> int:
    """Bytes that come and go while a block runs.

    What is not saved, and gradients on their way back, were seen to take as much again as what is (attention in
    float32), or the weight of a layer whose quantized one is computed with.
    """
    return max(graph, dequantized)


def _linear_inputs(span: Span) -> int:
    """The numbers that go into the linear layers of a block for each token; of the block where they are most."""
    blocks = [span.where.of(span.model).get_submodule(str(block)) for block in span.blocks]
    return max(sum(one.in_features for one in block.modules() if isinstance(one, nn.Linear)) for block in blocks)


def _dequantized_bytes(module: nn.Module, span: Span) -> int:
    """Of a quantized layer's weight, as floats."""
    if not isinstance(module, nn.Linear) or module.weight.is_floating_point():
        return 0
    return module.in_features * module.out_features * span.dtype.itemsize


def plain_call(span: Span, rows: int, tokens: int) -> TrainingCall:
    """A call over all of a span's blocks without an adapter; its hidden states are on the meta device."""
    hidden = torch.empty(rows, tokens, span.hidden_size, dtype=span.dtype, device="meta")
    return TrainingCall(Inputs(hidden), Mode(span.blocks, training=True), None, {})
