"""The adapters that PEFT put on the ghosts, as bundles for the wire.

Collecting them costs milliseconds on a large model, so what was collected is kept until modules or states change.
Values are another matter: fused optimizers and `.data` change a parameter without touching its `_version`, so
every call hashes them anew, but for the decode steps of a generation: these trust the versions.
"""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from client.dropout import adapter_dropout, dropout_state
from client.ghost import GhostTensor
from client.shifts import shift_adapter
from protocol.adapters import METHODS, PATTERNS, AdapterSpec, Manifest, bundle_hash
from protocol.errors import BadAdapter, BadUsage

if TYPE_CHECKING:  # it takes seconds to import
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

_REFUSED: dict[str, Any] = {
    "bias": "none", "layer_replication": None, "use_qalora": False,
    "alora_invocation_tokens": None, "velora_config": None, "monteclora_config": None, "arrow_config": None,
    "kasa_config": None, "use_bdlora": None, "megatron_config": None, "use_effective_conv2d": False,
}  # fmt: skip
"""Options that change a model in ways that do not travel, and the values at which they do not."""


@dataclass(frozen=True)
class Bundle:
    """What one span needs of the adapters."""

    manifest: str
    tensors: Mapping[str, torch.Tensor]
    """Numbered, as `PutAdapter` carries them."""
    key: bytes
    """Content hash."""
    is_trained: bool
    """Whether any of its tensors is being trained."""


@dataclass(frozen=True)
class Snapshot:
    """The active adapters on all blocks, at one moment."""

    specs: tuple[AdapterSpec, ...]
    scaling: Mapping[str, Mapping[str, float]]
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` -> parameter or buffer; the parameters themselves, for autograd."""
    has_dropout: bool
    """Whether any of it is live."""
    _bundles: dict[range, Bundle | None] = field(default_factory=dict)

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """The names of the tensors that are being trained."""
        return tuple(name for name, tensor in self.tensors.items() if tensor.requires_grad)

    def bundle(self, blocks: range) -> Bundle | None:
        """The bundle for a span; `None` when no adapter is on its blocks."""
        if blocks not in self._bundles:
            self._bundles[blocks] = self._make_bundle(blocks)
        return self._bundles[blocks]

    def _make_bundle(self, blocks: range) -> Bundle | None:
        specs = tuple(spec for spec in (_restrict(spec, blocks) for spec in self.specs) if spec)
        if not specs:
            return None
        mine = {name: tensor for name, tensor in self.tensors.items() if _block(name) in blocks}
        unique = {id(tensor): tensor for tensor in mine.values()}
        numbers = {key: number for number, key in enumerate(unique)}
        manifest = Manifest(
            adapters=specs,
            scaling={name: dict(factors) for name, factors in self.scaling.items() if _block(name) in blocks},
            tensors={name: numbers[id(tensor)] for name, tensor in mine.items()},
            trainable=tuple(name for name in self.trainable if name in mine),
        ).to_json()
        values = [tensor.detach() for tensor in unique.values()]
        named = {str(number): value for number, value in enumerate(values)}
        is_trained = any(name in mine for name in self.trainable)
        return Bundle(manifest, named, bundle_hash(manifest, values), is_trained)


class AdapterSource:
    """Watches the ghost blocks of a model for adapters."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList):
        self._model, self._blocks = model, blocks
        self._remote = frozenset(blocks.modules())
        self._watch: _Watch | None = None
        self._snapshot: Snapshot | None = None

    def snapshot(self, fresh: bool, training: bool) -> Snapshot | None:
        """The active adapters now; `None` without any. `fresh`: do not trust that unchanged versions mean equal values.

        `training`: whether the blocks are in training mode. Else adapters are sent with dropout that is not live, too:
        it drops nothing then, and they are the same bundles as in training.

        Raises `BadAdapter` and `BadUsage` for what cannot travel.
        """
        if fresh and self._watch is not None:
            self._watch.refuse_misuse()
        if self._watch is None or self._watch.changed() or self._watch.training != training:
            self._watch, watch = None, _Watch(self._blocks, self._remote, training)
            watch.refuse_misuse()
            self._snapshot = self._collect(watch.layers, training)
            self._watch = watch
        elif fresh and self._snapshot is not None:
            self._snapshot = replace(self._snapshot, _bundles={})
        return self._snapshot

    def _collect(self, layers: "Mapping[str, BaseTunerLayer]", training: bool) -> Snapshot | None:
        active = _active(layers)
        has_dropout = any(
            is_live and rate > 0
            for name, on in active.items()
            for layer in on.values()
            for rate, is_live in adapter_dropout(layer, name).values()
        )
        configs: Mapping[str, PeftConfig] = self._model.peft_config if active else {}  # type: ignore[assignment]
        specs, shift = list[AdapterSpec](), shift_adapter(self._blocks)
        scaling, tensors = dict[str, dict[str, float]](), dict[str, torch.Tensor]()
        for number, (name, on) in enumerate(active.items()):
            alias = f"a{number}"  # users' names may have characters that must not travel, and tell peers nothing
            specs.append(_spec(name, alias, configs[name], on, training or has_dropout))
            for path, layer in on.items():
                tensors |= _tensors(path, layer, name, alias)
                if isinstance(factors := getattr(layer, "scaling", None), dict) and name in factors:
                    scaling.setdefault(path, {})[alias] = float(factors[name])
        if shift is not None:
            if any(spec.options.get("use_dora") for spec in specs):
                raise BadAdapter(
                    "use_dora=True does not work on weights that PiSSA or OLoRA has changed; use one or the other."
                )
            specs.insert(0, shift.spec)  # first, for the least rounding: it mostly cancels what comes after
            tensors |= shift.tensors
            for path, factor in shift.scaling.items():
                scaling[path] = {**scaling.get(path, {}), shift.spec.name: factor}
        if not specs:
            return None
        return Snapshot(tuple(specs), scaling, tensors, has_dropout)


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


def _is_adapter(module: nn.Module) -> "TypeGuard[BaseTunerLayer]":
    """Whether it is a layer of PEFT's; where nobody has imported PEFT there is none."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _is_on_parameter(layer: "BaseTunerLayer") -> bool:
    """Whether a layer of PEFT's is on a parameter rather than on a module."""
    from peft.tuners.lora import ParamWrapper

    return isinstance(layer, ParamWrapper)


def _state(layer: "BaseTunerLayer") -> tuple[list[str], bool, dict[str, float]]:
    return list(layer.active_adapters), layer.disable_adapters, dict(getattr(layer, "scaling", {}))


def _target(path: str, layer: "BaseTunerLayer") -> str:
    """The module or parameter that a layer of PEFT's is on. Layers on parameters of one module are nested in it."""
    if not _is_on_parameter(layer):
        return path
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layer.parameter_name}"


def _active(layers: "Mapping[str, BaseTunerLayer]") -> "dict[str, dict[str, BaseTunerLayer]]":
    """Adapter -> the layers that it applies to, by path; in the order in which adapters apply.

    Each layer has a say: PEFT switches all of them at once, but users do so with some of them.
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


def _tensors(path: str, layer: "BaseTunerLayer", adapter: str, alias: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)):
        kind, *rest = name.split(".")
        if rest[:1] == [adapter] and not isinstance(tensor.data, GhostTensor):
            yield ".".join((path, kind, alias, *rest[1:])), tensor


def _spec(
    name: str, alias: str, config: "PeftConfig", layers: "Mapping[str, BaseTunerLayer]", training: bool
) -> AdapterSpec:
    targets = {_target(path, layer): layer for path, layer in layers.items()}
    method = config.peft_type.value if hasattr(config.peft_type, "value") else str(config.peft_type)
    if method not in METHODS:
        raise BadAdapter(f"PEFT method {method} does not work through a swarm; expected one of {', '.join(METHODS)}.")
    values = config.to_dict()
    for option, harmless in _REFUSED.items():
        if values.get(option) and values[option] != harmless:
            raise BadAdapter(f"{option}={values[option]!r} of {method} does not work through a swarm; leave it out.")
    options = {key: _plain(values[key]) for key in METHODS[method] if key in values}
    options |= _dropout(name, targets, training)
    attributes = ("r", _ALPHA.get(method, "alpha"), "fourierft_n_frequency")
    for pattern, attribute in zip(PATTERNS, attributes, strict=True):
        if options.get(pattern):
            options[pattern] = _resolve(name, targets, attribute)
    if "feedforward_modules" in options:
        options["feedforward_modules"] = sorted(t for t, layer in targets.items() if layer.is_feedforward)
    parameters = tuple(target for target, layer in targets.items() if _is_on_parameter(layer))
    modules = tuple(target for target in targets if target not in parameters)
    return AdapterSpec(name=alias, method=method, options=options, targets=modules, parameters=parameters)


def _dropout(adapter: str, targets: "Mapping[str, BaseTunerLayer]", training: bool) -> dict[str, float]:
    """As the modules have it: they can be switched off, and TRL does so, while the configuration stays."""
    found = [
        {option: rate if is_live or not training else 0.0 for option, (rate, is_live) in rates.items()}
        for rates in (adapter_dropout(layer, adapter) for layer in targets.values())
    ]
    if any(rates != found[0] for rates in found):
        raise BadAdapter(f"Adapter {adapter!r} has other dropout on some modules than on others; make it the same.")
    return found[0]


_ALPHA = {"LORA": "lora_alpha", "ADALORA": "lora_alpha"}


def _resolve(adapter: str, targets: "Mapping[str, BaseTunerLayer]", attribute: str) -> dict[str, Any]:
    """A pattern option as it came out, target by target: no pattern of a client's is ever run by a peer."""
    found = {target: getattr(layer, attribute, {}) for target, layer in targets.items()}
    return {target: values[adapter] for target, values in found.items() if adapter in values}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _block(name: str) -> int:
    return int(name.partition(".")[0])


def _restrict(spec: AdapterSpec, blocks: range) -> AdapterSpec | None:
    targets = tuple(target for target in spec.targets if _block(target) in blocks)
    parameters = tuple(target for target in spec.parameters if _block(target) in blocks)
    if not (targets or parameters):
        return None
    options = dict(spec.options)
    for key in PATTERNS:
        if options.get(key):
            options[key] = {target: value for target, value in options[key].items() if _block(target) in blocks}
    if "feedforward_modules" in options:
        options["feedforward_modules"] = [path for path in options["feedforward_modules"] if path in targets]
    return AdapterSpec(name=spec.name, method=spec.method, options=options, targets=targets, parameters=parameters)
