"""Notices whether adapters on the ghost blocks have changed, and refuses changes that would have no effect.

Every decode step asks. So a watch lays out all that it looks at in flat lists when it is made, and compares them with
a few calls that loop over all modules in C.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from client.adapters.attributes import Attributes
from client.adapters.dropout import dropout_attributes
from client.adapters.original import Original, own_tensors
from client.adapters.peft_layers import is_adapter_layer
from client.ghosts.tensor import GhostTensor
from protocol.errors import BadAdapter, BadUsage

if TYPE_CHECKING:  # it takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

_HOOKS = attrgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_SHAPE, _VERSION = attrgetter("shape"), attrgetter("_version")
_IS_TRAINED = attrgetter("requires_grad")


class Watch:
    """The ghost blocks as they were when this was made.

    `original`: the blocks as they were loaded. `training`: see `AdapterSource.snapshot`.
    """

    def __init__(self, blocks: nn.ModuleList, original: Original, training: bool):
        self.training = training
        self._original = original
        self.layers = {name: module for name, module in blocks.named_modules() if is_adapter_layer(module)}
        """Path -> PEFT's layer."""
        layers = list(self.layers.values())
        self._modules = list(blocks.modules())
        self._ghosts = {name: p for name, p in blocks.named_parameters() if isinstance(p, GhostTensor)}
        self._members = _Members(self._modules)
        self._settings = Attributes(_settings(layers, self._ghosts.values()))
        self._tensors = list(_own_tensors(layers))
        self._versions = list(map(_VERSION, self._tensors))
        self._shapes = list(map(_SHAPE, self._tensors))
        self._stranger = next(_strangers(blocks, original, layers), None)
        self._misplaced = original.misplaced(blocks)

    def changed(self) -> bool:
        """Whether modules, tensors, or settings of adapters are others; values within the same tensors aside."""
        return self._members.changed() or self._settings.changed()

    def reshaped(self) -> bool:
        """Whether an adapter's tensor has another shape: PEFT swaps in an adapter of a higher rank in place."""
        return list(map(_SHAPE, self._tensors)) != self._shapes

    def take_edits(self) -> bool:
        """Whether autograd has seen adapters' tensors being changed in place since the last question."""
        before, self._versions = self._versions, list(map(_VERSION, self._tensors))
        return self._versions != before

    def refuse_misuse(self) -> None:
        """Raise for what would have no effect: `BadAdapter` for a trained ghost or a module that nobody knows,
        `BadUsage` for other changes of the blocks themselves, and for hooks on modules that run elsewhere.
        """
        with torch._C.DisableTorchFunctionSubclass():  # else each ghost is asked by a Python call
            is_trained = any(map(_IS_TRAINED, self._ghosts.values()))
        if is_trained:
            name = next(name for name, ghost in self._ghosts.items() if ghost.requires_grad)
            raise BadAdapter(
                f"{name} is a weight of the remote blocks and cannot be trained (requires_grad was turned on); "
                "train an adapter on it instead."
            )
        if self._stranger is not None:
            raise BadAdapter(
                f"{self._stranger} was put into the remote blocks, where nothing of this machine's runs; use a LoRA or "
                "another of PEFT's adapters that a swarm knows."
            )
        if self._misplaced is not None:
            raise BadUsage(
                f"{self._misplaced} was removed from the remote blocks, moved or replaced, and peers run the blocks as "
                "the checkpoint has them; only blocks at the end can be left out."
            )
        if (setting := self._original.changed_setting()) is not None:
            raise BadUsage(
                f"{setting}; peers run the blocks as the checkpoint's config.json says, so a change here has no effect."
            )
        if any(chain.from_iterable(map(_HOOKS, self._modules))):
            raise BadUsage(
                "Hooks on modules of the remote blocks never run, so neither adapter_names= (another adapter per row: "
                "use one call per adapter) nor an initialisation from activations (EVA, CorDA) works through a swarm."
            )


class _Members:
    """The children, parameters and buffers of modules, by name."""

    def __init__(self, modules: Iterable[nn.Module]):
        tables: list[dict[str, Any]] = [t for m in modules for t in (m._modules, m._parameters, m._buffers)]
        self._empty = [table for table in tables if not table]
        self._filled = [table for table in tables if table]
        self._lengths = list(map(len, self._filled))
        entries = [(table, name, member) for table in self._filled for name, member in table.items()]
        self._tables = [table for table, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._found = [member for _, _, member in entries]

    def changed(self) -> bool:
        """Whether a member came, went, or was replaced."""
        now = map(dict.get, self._tables, self._names, repeat(...))  # None is a member, too: a bias that is left out
        return any(self._empty) or list(map(len, self._filled)) != self._lengths or not all(map(is_, now, self._found))


def _settings(layers: "Collection[BaseTunerLayer]", ghosts: Iterable[nn.Parameter]) -> Iterator[tuple[object, str]]:
    """What decides which adapters are on, how strongly, which of their tensors are trained, and what is dropped."""
    for layer in layers:
        yield from ((layer, name) for name in ("active_adapter", "disable_adapters", "scaling"))
        for part in layer.modules():
            yield from ((part, name) for name in dropout_attributes(part))
    yield from ((tensor, "requires_grad") for tensor in _own_tensors(layers))
    yield from ((ghost, "subtracted") for ghost in ghosts)


def _own_tensors(layers: "Iterable[BaseTunerLayer]") -> Iterator[torch.Tensor]:
    tensors = (tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    return (tensor for tensor in tensors if not isinstance(tensor.data, GhostTensor))


def _strangers(blocks: nn.Module, original: Original, layers: "Iterable[BaseTunerLayer]") -> Iterator[str]:
    """The names of modules that are neither on the peers nor an adapter's, and of tensors in the place of ghosts."""
    adapters = {m for layer in layers for m in set(layer.modules()) - set(layer.get_base_layer().modules())}
    for path, module in blocks.named_modules():
        if module not in original and module not in adapters:
            yield path
        elif module in original:
            for name, tensor in own_tensors(module):
                if not isinstance(tensor.data, GhostTensor):
                    yield f"{path}.{name}"
