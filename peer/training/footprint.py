"""What a training call will take: foreseen, from what small calls of its kind were seen to take."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
_GUESS = 2
"""How many times what a block keeps it takes at most, where it computes in another way at every length."""


@dataclass(frozen=True)
class Growth:
    """Bytes of a row of t tokens: constant + linear * t + square * t**2, of several moments, of which the most counts.

    Attention keeps its probabilities where no fused kernel computes it (ALiBi, soft caps), and masks: squares.
    """

    constant: NDArray[np.float64]
    linear: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def through(cls, rows: int, tokens: int, sizes: Sequence[Any]) -> "Growth":
        """From the bytes of so many rows of one, two and three times so many tokens; at each moment, if sequences."""
        first, second, third = (np.atleast_1d(np.asarray(size, dtype=np.float64)) for size in sizes)
        square = (third - 2 * second + first) / (2 * tokens**2)
        linear = (second - first) / tokens - 3 * tokens * square
        return cls(first - linear * tokens - square * tokens**2, linear / rows, square / rows)

    def at(self, rows: int, tokens: int) -> int:
        """Bytes, for so many rows of so many tokens."""
        return max(0, round(float((self.constant + rows * tokens * (self.linear + self.square * tokens)).max())))


@dataclass(frozen=True)
class Taken:
    """What a call of one block was seen to take."""

    kept: int
    """Bytes of its graph."""
    history: Sequence[int]
    """Bytes taken after each operation, while it and a neighbour were computed without a graph and then again."""


@dataclass(frozen=True)
class _Block:
    """What a block takes."""

    kept: Growth
    most: Growth
    """While it is computed without a graph, and again in the backward."""

    @classmethod
    def seen(cls, sizes: Sequence[Taken]) -> "_Block":
        kept = Growth.through(_ROWS, _TOKENS, [size.kept for size in sizes])
        if len({len(size.history) for size in sizes}) == 1:
            return cls(kept, Growth.through(_ROWS, _TOKENS, [size.history for size in sizes]))
        return cls(kept, Growth.through(_ROWS, _TOKENS, [size.kept * _GUESS for size in sizes]))


@dataclass(frozen=True)
class _Kind:
    """Calls that take as much for each token: of one module tree, run in one way."""

    types: dict[int, int]
    """Block -> the first one of its type."""
    blocks: dict[int, _Block] = field(default_factory=dict)
    """The first block of a type -> what it takes."""


class Footprint:
    """Foresees the bytes that calls take, without their inputs' own.

    `measure`: runs a small call of one block. It is called three times for each kind of calls and type of blocks, when
    the first such call comes: this belongs on the compute thread.
    """

    def __init__(self, span: Span, adapters: AdapterStore, measure: Callable[[TrainingCall], Taken]):
        self._span, self._adapters, self._measure = span, adapters, measure
        self._kinds: dict[Any, _Kind] = {}

    def of(self, call: TrainingCall) -> int:
        """Bytes that a call's autograd graph will keep."""
        return sum(kept for kept, _ in self._blocks(call))

    def of_run(self, call: TrainingCall) -> int:
        """Bytes that it takes as a whole while it runs: its graph, and what comes and goes in one block."""
        blocks = list(self._blocks(call))
        return sum(kept for kept, _ in blocks) + max(max(0, most - kept) for kept, most in blocks)

    def of_checkpoints(self, call: TrainingCall) -> int:
        """Bytes that it takes at least: the hidden states between blocks, and one block at a time."""
        states = call.inputs.hidden.numel() * self._span.dtype.itemsize
        return states * (len(call.mode.blocks) + 1) + max(most for _, most in self._blocks(call))

    def of_row(self, tokens: int) -> int:
        """Bytes that one row of so many tokens takes at least, with LoRA and dropout on all linear layers."""
        plain = self.of_checkpoints(plain_call(self._span, 1, tokens))
        return plain + lora_bytes(tokens, _linear_inputs(self._span))

    def _blocks(self, call: TrainingCall) -> Iterable[tuple[int, int]]:
        """Bytes that each block keeps, and the most that it takes."""
        kind, mode = self._kind(call), call.mode
        rows, tokens = call.inputs.hidden.shape[0], call.inputs.hidden.shape[1] + prefix_tokens(call.prefix)
        for block in mode.blocks:
            first = kind.types[block]
            if first not in kind.blocks:
                kind.blocks[first] = _Block.seen([self._measure(self._small(call, first, n)) for n in (1, 2, 3)])
            yield kind.blocks[first].kept.at(rows, tokens), kind.blocks[first].most.at(rows, tokens)

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


def lora_bytes(tokens: int, linear_inputs: int) -> int:
    """What LoRA with dropout keeps on the linear layers of a block into which so many numbers go for each token.

    The numbers in float32, as PEFT keeps adapters, which of them were dropped, and a tenth of that for the ranks.
    """
    return tokens * linear_inputs * 11 // 2


def _linear_inputs(span: Span) -> int:
    """The numbers that go into the linear layers of a block for each token; of the block where they are most."""
    blocks = [span.where.of(span.model).get_submodule(str(block)) for block in span.blocks]
    return max(sum(one.in_features for one in block.modules() if isinstance(one, nn.Linear)) for block in blocks)


def plain_call(span: Span, rows: int, tokens: int) -> TrainingCall:
    """A call over all of a span's blocks without an adapter; its hidden states are on the meta device."""
    hidden = torch.empty(rows, tokens, span.hidden_size, dtype=span.dtype, device="meta")
    return TrainingCall(Inputs(hidden), Mode(span.blocks, training=True), None, {})
