"""A span: the model's own trunk with the foreign blocks skipped, its stem and tail neutralised.

Hidden states go in as `inputs_embeds` and come out as the trunk's last hidden state, so there is no modelling code
per architecture: masks, rotary embeddings, sliding windows and caches are Transformers' own.
"""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from peer.kv_cache.arena import Shape
from peer.kv_cache.span_cache import SpanCache
from peer.span.cut import neutralise_scalars
from peer.span.transfer import to_device
from protocol.errors import BadAdapter, UnsupportedModel, first_line
from protocol.machine.forwards import call_with
from protocol.model.anatomy import BlockList, find_form, hidden_size


@dataclass(frozen=True)
class Adapted:
    """A module tree with a client's adapters in place of the span's own, and the tensors to run it with."""

    model: PreTrainedModel
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` -> tensor."""


@dataclass(frozen=True)
class Inputs:
    """What one trunk pass runs on."""

    hidden: torch.Tensor
    """(batch, tokens, hidden size); to be run, on the span's device and of its dtype."""
    mask: torch.Tensor | None = None
    """(batch, cached + new tokens), as the user gave it."""
    positions: torch.Tensor | None = None
    """(batch or 1, tokens), as the user gave them."""

    def on(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """The same with hidden states on a device, of a dtype."""
        return Inputs(to_device(self.hidden, device, dtype), self.mask, self.positions)


@dataclass(frozen=True)
class Mode:
    """How a trunk pass is run."""

    blocks: range
    training: bool = False
    dropout_seed: int | None = None
    autocast: torch.dtype | None = None


class Span:
    """Loaded blocks [start, end) of a model. Not thread-safe: one trunk pass at a time."""

    def __init__(self, model: PreTrainedModel, where: BlockList, start: int, end: int, dtype: torch.dtype):
        self.model, self.where, self.start, self.end, self.dtype = model, where, start, end, dtype
        self.config: PreTrainedConfig = self._trunk(model).config  # type: ignore[assignment]
        """The language model's, whatever else the model is."""
        self.hidden_size = hidden_size(self.config)
        self.device = next(p.device for p in model.parameters())
        self.takes_positions = "position_ids" in inspect.signature(type(self._trunk(model)).forward).parameters
        model.eval().requires_grad_(False)
        neutralise_scalars(model)
        self._check_identity()
        self.kv_shapes = self._find_kv_shapes()
        """Block -> what it caches of keys and of values for each token; of attention blocks only."""

    @property
    def blocks(self) -> range:
        """The blocks' indices."""
        return range(self.start, self.end)

    def run(
        self, inputs: Inputs, mode: Mode, cache: Cache | None = None, adapted: Adapted | None = None
    ) -> torch.Tensor:
        """The hidden states after `mode.blocks`: (batch, tokens, hidden size), in the span's dtype.

        Runs under the caller's grad mode; gradients reach `inputs.hidden`, the adapter tensors and a cache's prefix.
        """
        model = adapted.model if adapted else self.model
        self.where.of(model).active = mode.blocks  # type: ignore[assignment]
        if model.training != mode.training:
            model.train(mode.training)
        with ExitStack() as stack:
            if mode.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, mode.autocast))
            if mode.dropout_seed is not None:
                devices = [self.device] if self.device.type == "cuda" else []
                stack.enter_context(torch.random.fork_rng(devices=devices))
                torch.manual_seed(mode.dropout_seed)
            return self._call_trunk(model, self.arguments(inputs, cache), adapted.tensors if adapted else {})

    def arguments(self, inputs: Inputs, cache: Cache | None) -> dict[str, Any]:
        """What the trunk is called with."""
        arguments: dict[str, Any] = {
            "inputs_embeds": inputs.hidden,
            "attention_mask": _to(inputs.mask, self.device),
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self.takes_positions:
            arguments["position_ids"] = _to(inputs.positions, self.device)
        return arguments

    def _call_trunk(
        self, model: PreTrainedModel, arguments: dict[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        named = {f"{self.where.attribute}.{name}": tensor for name, tensor in tensors.items()}
        try:
            return call_with(self._trunk(model), named, arguments)[0]  # type: ignore[no-any-return]
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            # The inputs have been checked; options and dtypes of an adapter can contradict each other in many ways.
            if not tensors or _is_the_machines(error):
                raise
            raise BadAdapter(f"The adapter cannot be run: {first_line(error)}.") from error

    def _trunk(self, model: nn.Module) -> nn.Module:
        return self.where.trunk_of(model)

    @torch.no_grad()
    def _check_identity(self) -> None:
        """With every block skipped the trunk must return its input; also finds out what a block returns.

        Without this check a trunk that expects tuples would slice a tensor without a word, and a trunk that works on
        the hidden states by itself (Mamba hybrids, ...) would be served wrong.
        """
        blocks: Any = self.where.of(self.model)
        hidden = torch.randn(2, 3, self.hidden_size, dtype=self.dtype, device=self.device)
        inputs, nothing = Inputs(hidden), Mode(range(self.start, self.start))
        if not find_form(blocks.skip[0], lambda: self.run(inputs, nothing), partial(_is, hidden)):
            raise UnsupportedModel(
                f"{type(self._trunk(self.model)).__name__} changes the hidden states outside of its blocks, so spans "
                "of it would compute something else than the model; it cannot be served."
            )
        self._check_cache(hidden)

    @torch.no_grad()
    def _find_kv_shapes(self) -> dict[int, tuple[Shape, Shape]]:
        """A configuration does not say it in one way, so one token is run."""
        cache = SpanCache(self.config, self.blocks)
        token = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        self.run(Inputs(token), Mode(self.blocks), cache)
        found = {
            block: [getattr(cache.layers[block], name, None) for name in ("keys", "values")] for block in self.blocks
        }
        pairs = {
            block: (keys, values)
            for block, (keys, values) in found.items()
            if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
        }
        if any(tensor.ndim != 4 for pair in pairs.values() for tensor in pair):
            raise UnsupportedModel(
                f"{type(self._trunk(self.model)).__name__} does not cache keys and values token by token; it cannot be "
                "served."
            )
        return {block: (Shape.of(keys), Shape.of(values)) for block, (keys, values) in pairs.items()}

    def _check_cache(self, hidden: torch.Tensor) -> None:
        """A trunk that has no place for a KV cache (Mamba) would ignore it and generate wrong tokens without a word."""
        trunk = type(self._trunk(self.model))
        try:
            if "past_key_values" not in inspect.signature(trunk.forward).parameters:
                raise TypeError("it takes none")
            self.run(Inputs(hidden), Mode(range(self.start, self.start)), SpanCache(self.config, self.blocks))
        except Exception as error:  # any failure at all
            raise UnsupportedModel(
                f"{trunk.__name__} does not generate with the KV cache that peers keep ({first_line(error)}); "
                "it cannot be served."
            ) from error


def find_module(blocks: nn.Module, name: str) -> nn.Module | None:
    """The module `BLOCK.PATH` of the block list, if there is one."""
    try:
        return blocks.get_submodule(name)
    except AttributeError:
        return None


def _is(hidden: torch.Tensor, output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.shape == hidden.shape and torch.equal(output, hidden)


def _is_the_machines(error: Exception) -> bool:
    """Whether memory or a device failed, whatever the adapter."""
    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or "allocate memory" in str(error)


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else to_device(tensor, device)
