"""A span: the model's own trunk with the foreign blocks skipped, its stem and tail neutralised.

Hidden states go in as `inputs_embeds` and come out as the trunk's last hidden state, so there is no modelling code
per architecture: masks, rotary embeddings, sliding windows and caches are Transformers' own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from peer.span.failures import is_of_the_machine, is_out_of_memory
from peer.span.transfer import to_device
from protocol.errors import BadAdapter, UnsupportedModel, first_line
from protocol.model.anatomy import BlockList, find_form, hidden_size
from protocol.model.forwards import call_with, replaced


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


class _Cache:
    """Stands for a KV cache among a block's arguments: to be computed again, it needs a new one."""


@dataclass(frozen=True)
class BlockCall:
    """What the trunk called a block with: all that is needed to compute the same again."""

    block: int
    hidden: torch.Tensor
    """(batch, tokens, hidden size)."""
    positional: tuple[Any, ...]
    """After the hidden states."""
    arguments: Mapping[str, Any]
    random: tuple[torch.Tensor, ...]
    """States of the generators that dropout draws from: the CPU's, and that of the span's GPU."""


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
        tables = (buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions"))
        self.positions = min(map(len, tables), default=None)
        """How many positions the blocks have tables of (GPT-J, CodeGen); None: they compute them, or need none."""

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
        with self._prepared(model, mode), ExitStack() as stack:
            if mode.dropout_seed is not None:
                stack.enter_context(self._forked_generators())
                torch.manual_seed(mode.dropout_seed)
            return self._call_trunk(model, self.arguments(inputs, cache), adapted.tensors if adapted else {})

    def record(
        self, inputs: Inputs, mode: Mode, cache: Cache | None = None, adapted: Adapted | None = None
    ) -> tuple[torch.Tensor, list[BlockCall]]:
        """What `run` returns, and what each block was called with, in order."""
        blocks = self.where.of(adapted.model if adapted else self.model)
        numbers = {blocks.get_submodule(str(block)): block for block in mode.blocks}
        calls: list[BlockCall] = []

        def recorded(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def call(*positional: Any, **arguments: Any) -> Any:
                calls.append(self._block_call(numbers[module], positional, arguments))
                return forward(*positional, **arguments)

            return call

        with replaced(numbers, recorded):
            return self.run(inputs, mode, cache, adapted), calls

    def _block_call(self, block: int, positional: tuple[Any, ...], arguments: Mapping[str, Any]) -> BlockCall:
        kept = {name: _Cache if isinstance(value, Cache) else value for name, value in arguments.items()}
        hidden, *others = positional if positional else (kept.pop("hidden_states"),)
        random = [torch.get_device_module(device).get_rng_state(device) for device in self._generators]
        return BlockCall(block, hidden, tuple(others), kept, (torch.get_rng_state(), *random))

    def run_block(
        self, call: BlockCall, hidden: torch.Tensor, mode: Mode, cache: Cache | None, adapted: Adapted | None
    ) -> torch.Tensor:
        """The hidden states after one block, called as it was in `record`, dropout masks included.

        `hidden`: what it was called with, or a leaf made of that. `cache`: new, as given to `record`, or with the
        prefix of this block only. Runs under the caller's grad mode.
        """
        model, own = (adapted.model if adapted else self.model), f"{call.block}."
        named = adapted.tensors if adapted else {}
        tensors = {name.removeprefix(own): tensor for name, tensor in named.items() if name.startswith(own)}
        arguments = {name: cache if value is _Cache else value for name, value in call.arguments.items()}
        with self._prepared(model, mode), self._forked_generators():
            torch.set_rng_state(call.random[0])
            for device, state in zip(self._generators, call.random[1:], strict=True):
                torch.get_device_module(device).set_rng_state(state, device)
            block = self.where.of(model).get_submodule(str(call.block))
            output = call_with(block, tensors, arguments, hidden, *call.positional)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    @property
    def _generators(self) -> list[torch.device]:
        """The GPUs whose random numbers are drawn, beside the CPU's."""
        return [] if self.device.type == "cpu" else [self.device]

    def _forked_generators(self) -> AbstractContextManager[None]:
        """After the context random numbers go on as before it."""
        return torch.random.fork_rng(devices=self._generators, device_type=self.device.type)

    @contextmanager
    def _prepared(self, model: PreTrainedModel, mode: Mode) -> Iterator[None]:
        if model.training != mode.training:
            model.train(mode.training)
        with ExitStack() as stack:
            if mode.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, mode.autocast))
            yield

    def computes(self) -> bool:
        """Whether the device still does. After some errors a GPU does nothing more for the process that met them."""
        try:
            return (torch.ones(2, device=self.device) + 1).sum().item() == 4
        except Exception as error:  # any failure at all
            return is_out_of_memory(error)

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
            if not tensors or is_of_the_machine(error):
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


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else to_device(tensor, device)
