"""Training calls: forward, and backward from what was kept or by computing the forward again."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from math import inf
from typing import TypeVar

import torch

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.compute.failures import let_go
from peer.kv_cache.span_cache import SpanCache, prefix_cache
from peer.span.failures import is_out_of_memory
from peer.span.span import Adapted, BlockCall, Inputs, Span
from peer.span.transfer import to_host
from peer.training.allocated import Allocated
from peer.training.call import TrainingCall
from peer.training.footprint import Footprint, Taken, plain_call
from peer.training.kept import Checkpoints, Graph, Kept, KeptCalls, checkpoint_bytes, held_by_operations
from protocol.errors import TooLong, UnknownCall
from protocol.records import Trainable

_MOST_TOKENS = 2**20
"""Of one call: none has more."""
T = TypeVar("T")
Adding = Callable[[StoredAdapter, Mapping[str, torch.Tensor]], AbstractContextManager[None]]
"""Within the context the span itself runs with an adapter, of which these are the tensors."""


class Trainer:
    """Runs training calls on a span, within `max_kept_bytes` for all that is kept, and `max_bytes` with what runs.

    What a call takes is foreseen. Where its activations are too many, only the hidden states before each block are
    kept, and backward computes block after block again: the same numbers, for the time of one more forward. The oldest
    kept calls give way to it then. Raises `TooLong` for calls that do not fit even so. Where memory lacks all the same,
    kept calls give way, and the call is tried once more in the sparing way; then what torch raises is raised.

    `adding`, where a method takes it: how a call's adapters are applied; `None`: by their PEFT tree. Such a call runs
    beside others; where it does not fit as it is, `torch.OutOfMemoryError` is raised, and it should be run alone.
    """

    def __init__(self, span: Span, adapters: AdapterStore, max_kept_bytes: int, max_bytes: int):
        self._span, self._adapters, self.kept, self.max_bytes = span, adapters, KeptCalls(max_kept_bytes), max_bytes
        self._trainable: Trainable | None = None
        self.footprint = Footprint(span, adapters, self._try)

    @property
    def trainable(self) -> Trainable | None:
        """What a client can train now; `None` before `measure`."""
        most, span = self._trainable, self._span
        if most is None:
            return None
        states = span.hidden_size * span.dtype.itemsize * (len(span.blocks) + 1)
        share = self.kept.max_bytes // states // max(1, len(self.kept.owners))
        return Trainable(row=most.row, tokens=min(most.tokens, share))

    def measure(self, max_length: int) -> None:
        """Find out what can be trained, in rows of up to `max_length` tokens: without adapters, which take more.

        Raises whatever a span raises that cannot be trained.
        """

        def take(tokens: int) -> int:
            """Bytes, as one row: shorter ones of as many tokens take less."""
            return self.footprint.of_checkpoints(plain_call(self._span, 1, tokens))

        most = bisect_right(range(1, _MOST_TOKENS + 1), self.max_bytes, key=take)
        self._trainable = Trainable(row=min(max_length, most), tokens=most)

    def _try(self, call: TrainingCall) -> Taken:
        kept, (block,) = self._graph(call, "", None, 0).size, call.mode.blocks
        # Beside a neighbour: some trunks hold on to what one block put out (its attention's probabilities) in the next.
        first = max(self._span.start, block - 1)
        both = replace(call, mode=replace(call.mode, blocks=range(first, min(first + 2, self._span.end))))
        with Allocated() as allocated:
            checkpoints = self._checkpoints(both, "", 0)
            checkpoints.backward(torch.ones_like(checkpoints.result))
        return Taken(kept, allocated.history)

    def forward(
        self, call: TrainingCall, owner: str, keep: bool, adding: Adding | None = None
    ) -> tuple[torch.Tensor, int]:
        """The hidden states (rows, tokens, hidden size), and the ID of what is kept for the backward; 0: nothing."""
        if not keep:
            return self._run_twice(call, adding, lambda call, _: (self._forward(call, adding), 0))
        return self._run_twice(call, adding, lambda call, again: self._forward_and_keep(call, owner, adding, again))

    def backward_kept(self, call_id: int, owner: str, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients of a kept call, which is dropped by it. Raises `UnknownCall`, `BadRequest`."""
        kept = self.kept.take(call_id, owner, grad)
        size = kept.size
        self._spare(kept.takes)
        try:
            return kept.backward(grad)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)
        del kept
        self._make_room(size)
        raise UnknownCall("There was no memory for the backward of this call; send the forward's inputs again.")

    def backward(self, call: TrainingCall, grad: torch.Tensor, adding: Adding | None = None) -> dict[str, torch.Tensor]:
        """Gradients by computing the forward again, dropout masks included."""
        return self._run_twice(call, adding, lambda call, again: self._passed(call, "", adding, again).backward(grad))

    def give_way(self) -> None:
        """Drop all that is kept, for what else lacks memory: it can be computed again."""
        self._make_room(inf)

    def _run_twice(self, call: TrainingCall, adding: Adding | None, run: Callable[[TrainingCall, bool], T]) -> T:
        """`run(call, False)`, the call on the device; if there is no memory for that, others give way: `..., True`."""
        try:
            return run(call.on(self._span), False)
        except Exception as error:
            if adding or not is_out_of_memory(error):
                raise
            let_go(error)
        self._make_room(self.footprint.of_checkpoints(call))
        return run(call.on(self._span), True)

    def _make_room(self, size: float) -> None:
        self.kept.drop_oldest(size)
        if self._span.device.type != "cpu":
            torch.get_device_module(self._span.device).empty_cache()

    @torch.no_grad()
    def _forward(self, call: TrainingCall, adding: Adding | None) -> torch.Tensor:
        return to_host(self._run(call, {}, adding))

    def _forward_and_keep(
        self, call: TrainingCall, owner: str, adding: Adding | None, sparing: bool
    ) -> tuple[torch.Tensor, int]:
        kept = self._passed(call, owner, adding, sparing)
        return to_host(kept.result.detach()), self.kept.add(kept)

    def _passed(self, call: TrainingCall, owner: str, adding: Adding | None, sparing: bool) -> Kept:
        """A forward's result and what its backward needs, as much as fits; as little as can be if `sparing`."""
        foreseen, kept = self.footprint, self.kept
        takes = foreseen.of_run(call)
        if not sparing and foreseen.of(call) <= kept.max_bytes and takes <= self.max_bytes:
            self._spare(takes)
            return self._graph(call, owner, adding, takes)
        if adding:
            raise torch.OutOfMemoryError("This call does not fit the memory beside others.")
        takes = foreseen.of_checkpoints(call)
        self._check_fits(call, takes)
        self._spare(takes)
        return self._checkpoints(call, owner, takes)

    def _spare(self, size: int) -> None:
        """Have so many bytes for the call that is about to run."""
        self.kept.drop_oldest(self.kept.size + size - self.max_bytes)

    def _check_fits(self, call: TrainingCall, least: int) -> None:
        if least > self.max_bytes:
            blocks, (rows, tokens) = call.mode.blocks, call.inputs.hidden.shape[:2]
            raise TooLong(
                f"To train blocks {blocks.start}:{blocks.stop} with {rows} x {tokens} tokens takes "
                f"{least / 1e6:,.1f} MB of memory at least, and this peer has {self.max_bytes / 1e6:,.1f} MB for it; "
                "send fewer or shorter rows, or use another peer."
            )

    def _graph(self, call: TrainingCall, owner: str, adding: Adding | None, takes: int) -> Graph:
        leaves, counter = _leaves(call), _SavedBytes(self._span, call)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            result = self._run(call, leaves, adding)
        if getattr(self._span.model, "is_loaded_in_8bit", False):
            for tensor in held_by_operations(result):
                counter.count(tensor)
        return Graph(leaves, result, counter.total, takes, owner, call.meets)

    @torch.no_grad()
    def _checkpoints(self, call: TrainingCall, owner: str, takes: int) -> Checkpoints:
        result, calls = self._span.record(
            call.inputs, call.mode, self._cache(call, {}, call.mode.blocks), self._adapted(call, {})
        )
        leaves = _leaves(call)
        again = partial(self._run_block, call, leaves)
        return Checkpoints(leaves, result, checkpoint_bytes(calls, result), takes, owner, False, calls, again)

    def _run_block(
        self, call: TrainingCall, leaves: Mapping[str, torch.Tensor], block: BlockCall, hidden: torch.Tensor
    ) -> torch.Tensor:
        cache = self._cache(call, leaves, range(block.block, block.block + 1))
        if block.hidden is not call.inputs.hidden:
            # In a whole graph it is no leaf. Of a leaf autocast makes one copy for all layers, so that gradients add up
            # in 16 bits (in blocks that begin with linear layers: OPT-350M, OLMo 2).
            hidden = hidden.view_as(hidden)
        return self._span.run_block(block, hidden, call.mode, cache, self._adapted(call, leaves))

    def _run(self, call: TrainingCall, leaves: Mapping[str, torch.Tensor], adding: Adding | None) -> torch.Tensor:
        hidden = leaves.get("hidden_states", call.inputs.hidden)
        inputs = Inputs(hidden, call.inputs.mask, call.inputs.positions)
        if call.adapter and adding is not None:
            with adding(call.adapter, _tensors(call.adapter, leaves)):
                return self._span.run(inputs, call.mode)
        cache = self._cache(call, leaves, call.mode.blocks)
        return self._span.run(inputs, call.mode, cache, self._adapted(call, leaves))

    def _cache(self, call: TrainingCall, leaves: Mapping[str, torch.Tensor], blocks: range) -> SpanCache | None:
        if not call.prefix:
            return None
        prefix = {
            block: (leaves.get(f"prefix.{block}.key", key), leaves.get(f"prefix.{block}.value", value))
            for block, (key, value) in call.prefix.items()
            if block in blocks
        }
        return prefix_cache(self._span.config, blocks, prefix)

    def _adapted(self, call: TrainingCall, leaves: Mapping[str, torch.Tensor]) -> Adapted | None:
        if call.adapter is None:
            return None
        return self._adapters.adapt(call.adapter, _tensors(call.adapter, leaves))


def _leaves(call: TrainingCall) -> dict[str, torch.Tensor]:
    leaves = {"hidden_states": call.inputs.hidden.detach().requires_grad_()}
    for block, (key, value) in call.prefix.items():
        leaves[f"prefix.{block}.key"] = key.detach().requires_grad_()
        leaves[f"prefix.{block}.value"] = value.detach().requires_grad_()
    if call.adapter:
        for name in call.adapter.manifest.trainable:
            leaves[f"adapter.{name}"] = call.adapter.tensors[name].detach().requires_grad_()
    return leaves


def _tensors(adapter: StoredAdapter, leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's, those that are trained replaced by leaves."""
    return {name: leaves.get(f"adapter.{name}", tensor) for name, tensor in adapter.tensors.items()}


class _SavedBytes:
    """Counts what autograd saves beyond the weights of the span and of the call's adapter."""

    def __init__(self, span: Span, call: TrainingCall):
        adapter = call.adapter.tensors.values() if call.adapter else ()
        self._seen = {t.untyped_storage().data_ptr() for t in (*span.model.parameters(), *adapter)}
        self.total = 0

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count(tensor)
        # An operation that saves its own result would hold itself: a graph that no backward follows, for ever.
        return tensor.detach()
