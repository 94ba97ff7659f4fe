"""Training calls: forward, and backward from kept activations or by computing the forward again."""

import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.kv_cache.span_cache import prefix_cache
from peer.span.span import Inputs, Mode, Span
from peer.span.transfer import to_device, to_host
from protocol.errors import BadRequest, UnknownCall
from protocol.tensors import KvPrefix


@dataclass(frozen=True)
class TrainingCall:
    """What a forward runs on; a backward needs the same again."""

    inputs: Inputs
    mode: Mode
    adapter: StoredAdapter | None
    prefix: KvPrefix
    meets: bool = False
    """Whether it runs where it can meet others (`peer.training.joined`), and so will its backward."""


Adding = Callable[[StoredAdapter, Mapping[str, torch.Tensor]], AbstractContextManager[None]]
"""Within the context the span itself runs with an adapter, of which these are the tensors."""


@dataclass(frozen=True)
class _Graph:
    """A forward that a backward will follow: its leaves, by the names of their gradients, and its result."""

    leaves: Mapping[str, torch.Tensor]
    result: torch.Tensor
    size: int
    """Bytes of saved activations."""
    owner: str
    meets: bool
    """Whether its backward can meet others."""


class Trainer:
    """Runs training calls on a span, keeping activations within a memory budget.

    `adding`, where a method takes it: how a call's adapters are applied; `None`: by their PEFT tree.
    """

    def __init__(self, span: Span, adapters: AdapterStore, max_kept_bytes: int):
        self._span, self._adapters, self._max_kept = span, adapters, max_kept_bytes
        self._kept = dict[int, _Graph]()
        """Oldest first."""

    def forward(
        self, call: TrainingCall, owner: str, keep: bool, adding: Adding | None = None
    ) -> tuple[torch.Tensor, int]:
        """The hidden states (rows, tokens, hidden size), and the ID of what is kept for the backward; 0: nothing."""
        if not keep:
            with torch.no_grad():
                return to_host(self._run(call, {}, adding)), 0
        graph = self._forward_with_graph(call, owner, adding)
        if graph.size > self._max_kept:
            return to_host(graph.result.detach()), 0
        call_id = secrets.randbits(63) | 1
        self._kept[call_id] = graph
        self._make_room()
        return to_host(graph.result.detach()), call_id

    def backward_kept(self, call_id: int, owner: str, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradients of a kept call, which is dropped by it. Raises `UnknownCall`, `BadRequest`."""
        graph = self._kept.get(call_id)
        if graph is None or graph.owner != owner:
            raise UnknownCall("The activations of this call are no longer kept; send the forward's inputs again.")
        if grad.shape != graph.result.shape:
            raise BadRequest(f"grad has shape {list(grad.shape)}; the forward's result has {list(graph.result.shape)}.")
        del self._kept[call_id]
        return _backward(graph, grad)

    def backward(self, call: TrainingCall, grad: torch.Tensor, adding: Adding | None = None) -> dict[str, torch.Tensor]:
        """Gradients by computing the forward again, dropout masks included."""
        return _backward(self._forward_with_graph(call, "", adding), grad)

    def meets(self, call_id: int) -> bool:
        """Whether the backward of a kept call can meet others."""
        graph = self._kept.get(call_id)
        return graph is not None and graph.meets

    def forget(self, owner: str) -> None:
        """Drop everything kept for a client that has gone."""
        for call_id in [i for i, graph in self._kept.items() if graph.owner == owner]:
            del self._kept[call_id]

    def _make_room(self) -> None:
        """The client that keeps most loses its oldest."""
        while True:
            sizes = Counter[str]()
            for graph in self._kept.values():
                sizes[graph.owner] += graph.size
            if sizes.total() <= self._max_kept:
                return
            greediest = sizes.most_common(1)[0][0]
            del self._kept[next(i for i, graph in self._kept.items() if graph.owner == greediest)]

    def _forward_with_graph(self, call: TrainingCall, owner: str, adding: Adding | None) -> _Graph:
        leaves = {"hidden_states": call.inputs.hidden.detach().requires_grad_()}
        for block, (key, value) in call.prefix.items():
            leaves[f"prefix.{block}.key"] = key.detach().requires_grad_()
            leaves[f"prefix.{block}.value"] = value.detach().requires_grad_()
        if call.adapter:
            for name in call.adapter.manifest.trainable:
                leaves[f"adapter.{name}"] = call.adapter.tensors[name].detach().requires_grad_()
        counter = _SavedBytes(self._span)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            result = self._run(call, leaves, adding)
        return _Graph(leaves, result, counter.total, owner, call.meets)

    def _run(self, call: TrainingCall, leaves: Mapping[str, torch.Tensor], adding: Adding | None) -> torch.Tensor:
        hidden = leaves.get("hidden_states", call.inputs.hidden)
        inputs = Inputs(hidden, call.inputs.mask, call.inputs.positions)
        cache = None
        if call.prefix:
            prefix = {
                block: (leaves.get(f"prefix.{block}.key", key), leaves.get(f"prefix.{block}.value", value))
                for block, (key, value) in call.prefix.items()
            }
            cache = prefix_cache(self._span.config, call.mode.blocks, prefix)
        adapted = None
        if call.adapter:
            own = call.adapter.tensors
            tensors = {name: leaves.get(f"adapter.{name}", tensor) for name, tensor in own.items()}
            if adding is not None:
                with adding(call.adapter, tensors):
                    return self._span.run(inputs, call.mode)
            adapted = self._adapters.adapt(call.adapter, tensors)
        return self._span.run(inputs, call.mode, cache, adapted)


class _SavedBytes:
    """Counts what autograd saves beyond the span's own weights."""

    def __init__(self, span: Span):
        self._seen = {p.untyped_storage().data_ptr() for p in span.model.parameters()}
        self.total = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        # An operation that saves its own result would hold itself: a graph that no backward follows, for ever.
        return tensor.detach()


def _backward(graph: _Graph, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = graph.leaves
    grad = to_device(grad, graph.result.device, graph.result.dtype)
    with torch.autograd.set_multithreading_enabled(False):  # a GPU's part also on this thread, which meets others
        gradients = torch.autograd.grad(graph.result, list(leaves.values()), grad, allow_unused=True)
    found = zip(leaves, gradients, strict=True)
    return {f"grad.{name}": to_host(gradient) for name, gradient in found if gradient is not None}
