"""TODO."""

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from torch import nn

from client.adapters.dropout import dropout_state
from client.adapters.peft_layers import _is_adapter, _state
from client.ghosts.tensor import GhostTensor
from protocol.errors import BadAdapter, BadUsage

if TYPE_CHECKING:  # it takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer


class _Watch:
    """Notices cheaply whether modules, adapters' state or tensors have changed since it was made."""

    def __init__(self, blocks: nn.ModuleList, remote: Collection[nn.Module], training: bool):
        self.training = training
        self.layers = {n: m for n, m in blocks.named_modules() if _is_adapter(m)}
        self._dicts = [
            (members, len(members), list(members.items()))
            for module in blocks.modules()
            for members in (module._modules, module._parameters, module._buffers)
            if members
        ]
        tensors = [
            tensor
            for layer in self.layers.values()
            for tensor in (*layer.parameters(), *layer.buffers())
            if not isinstance(tensor.data, GhostTensor)
        ]
        self._tensors = [(tensor, tensor._version, tensor.requires_grad) for tensor in tensors]
        self._states = [(layer, *_state(layer)) for layer in self.layers.values()]
        parts = [part for layer in self.layers.values() for part in layer.modules()]
        self._dropout = [(part, state) for part in parts if (state := dropout_state(part)) is not None]
        self._modules = list(blocks.modules())
        self._ghosts = [(n, p) for n, p in blocks.named_parameters() if isinstance(p, GhostTensor)]
        self._shifts = [p.shift for _, p in self._ghosts]
        self._stranger = next(_strangers(blocks, remote, self.layers.values()), None)

    def refuse_misuse(self) -> None:
        """Raise for what would pass without effect: training a ghost, modules and hooks where nothing runs here."""
        for name, parameter in self._ghosts:
            if parameter.requires_grad:
                raise BadAdapter(
                    f"{name} is a weight of the remote blocks and cannot be trained (requires_grad was turned on); "
                    "train an adapter on it instead."
                )
        if self._stranger is not None:
            raise BadAdapter(
                f"{self._stranger} was put into the remote blocks, where nothing of this machine's runs; use a LoRA or "
                "another of PEFT's adapters that a swarm knows."
            )
        if any(
            m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks
            for m in self._modules
        ):
            raise BadUsage(
                "Hooks on modules of the remote blocks never run, so neither adapter_names= (another adapter per row: "
                "use one call per adapter) nor an initialisation from activations (EVA, CorDA) works through a swarm."
            )

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        for members, length, items in self._dicts:
            if len(members) != length or any(members.get(key) is not value for key, value in items):
                return True
        if any(t._version != version or t.requires_grad != trained for t, version, trained in self._tensors):
            return True
        if any(_state(layer) != (active, disabled, scaling) for layer, active, disabled, scaling in self._states):
            return True
        if any(dropout_state(part) != state for part, state in self._dropout):
            return True
        return any(ghost.shift is not shift for (_, ghost), shift in zip(self._ghosts, self._shifts, strict=True))


def _strangers(blocks: nn.Module, remote: Collection[nn.Module], layers: "Iterable[BaseTunerLayer]") -> Iterator[str]:
    """What is neither on the peers nor of an adapter: the names of modules, and of parameters in place of ghosts."""
    adapters = {m for layer in layers for m in set(layer.modules()) - set(layer.get_base_layer().modules())}
    for path, module in blocks.named_modules():
        if module not in remote and module not in adapters:
            yield path
        elif module in remote:
            own = module.named_parameters(path, recurse=False)
            yield from (name for name, parameter in own if not isinstance(parameter.data, GhostTensor))
