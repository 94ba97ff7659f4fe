"""What PEFT's layers say of themselves: which adapters they hold, in which order they apply, with which tensors."""

import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from client.ghosts.tensor import GhostTensor
from protocol.errors import BadAdapter

if TYPE_CHECKING:  # it takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer


def is_adapter_layer(module: nn.Module) -> "TypeGuard[BaseTunerLayer]":
    """Whether a module is a layer of PEFT's. There is none while nobody has imported PEFT."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def is_on_parameter(layer: "BaseTunerLayer") -> bool:
    """Whether a layer of PEFT's is on a parameter rather than on a module."""
    from peft.tuners.lora import ParamWrapper

    return isinstance(layer, ParamWrapper)


def target_of(path: str, layer: "BaseTunerLayer") -> str:
    """The path of the module or parameter that the layer at `path` is on.

    PEFT nests layers on several parameters of one module in each other.
    """
    if not is_on_parameter(layer):
        return path
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}"


def active_adapters(layers: "Mapping[str, BaseTunerLayer]") -> "dict[str, dict[str, BaseTunerLayer]]":
    """Adapter -> the layers on which it is active, by path; in the order in which adapters apply.

    PEFT switches all layers at once, but users may switch some of them, so each layer is asked. Raises `BadAdapter`
    when layers contradict each other about the order.
    """
    found: dict[str, dict[str, BaseTunerLayer]] = {}
    order = TopologicalSorter[str]()
    for path, layer in layers.items():
        names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in _adapters_of(layer)]
        for name in names:
            found.setdefault(name, {})[path] = layer
            order.add(name)
        for before, name in pairwise(names):
            order.add(name, before)
    try:
        return {name: found[name] for name in order.static_order()}
    except CycleError as error:
        raise BadAdapter("Adapters are active in one order on some modules, and in another on others.") from error


def _adapters_of(layer: "BaseTunerLayer") -> set[str]:
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute, {})}


def adapter_tensors(path: str, layer: "BaseTunerLayer", adapter: str, alias: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of one adapter in the layer at `path`, named as on the wire: `alias` for `adapter`."""
    for name, tensor in (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)):
        kind, *rest = name.split(".")
        if rest[:1] == [adapter] and not isinstance(tensor.data, GhostTensor):
            yield ".".join((path, kind, alias, *rest[1:])), tensor
