"""All active adapters at one moment, and from them what the blocks of one span need, as it goes to a peer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from protocol.adapters import PATTERNS, AdapterSpec, Manifest, bundle_hash


@dataclass(frozen=True)
class AdapterBundle:
    """The adapters on one span's blocks, as they are sent."""

    manifest: str
    tensors: Mapping[str, torch.Tensor]
    """Numbered, as `PutAdapter` carries them."""
    key: bytes
    """Content hash."""
    is_trained: bool
    """Whether any of its tensors is being trained."""


@dataclass(frozen=True)
class _Layout:
    """What of a bundle stays the same while only values change."""

    manifest: str
    tensors: tuple[torch.Tensor, ...]
    """In the order of their numbers."""
    is_trained: bool

    def bundle(self, copies: Mapping[int, torch.Tensor]) -> AdapterBundle:
        """The bundle with the tensors' values of now; `copies`: see `Snapshot`."""
        values = [copies.get(id(tensor), tensor).detach() for tensor in self.tensors]
        named = {str(number): value for number, value in enumerate(values)}
        return AdapterBundle(self.manifest, named, bundle_hash(self.manifest, values), self.is_trained)


@dataclass(frozen=True)
class Snapshot:
    """The active adapters on all blocks, at one moment."""

    specs: tuple[AdapterSpec, ...]
    scaling: Mapping[str, Mapping[str, float]]
    """`BLOCK.PATH` of a module -> adapter -> factor."""
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` -> parameter or buffer; the parameters themselves, for autograd."""
    has_dropout: bool
    """Whether any of it is live."""
    _layouts: dict[range, _Layout | None] = field(default_factory=dict)
    _bundles: dict[range, AdapterBundle | None] = field(default_factory=dict)
    _copies: dict[int, torch.Tensor] = field(default_factory=dict)
    """`id` of a tensor that is on a device -> its values in host memory."""

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """The names of the tensors that are being trained."""
        return tuple(name for name, tensor in self.tensors.items() if tensor.requires_grad)

    def with_new_values(self) -> "Snapshot":
        """The same adapters, whose tensors may hold other values by now."""
        return replace(self, _bundles={}, _copies={})

    def uncopied(self) -> Sequence[torch.Tensor]:
        """The tensors on a device whose values are not in host memory yet, where `bundle` needs them."""
        return () if self._copies else self._on_devices

    def take_copies(self, copies: Iterable[torch.Tensor]) -> None:
        """Keep the values of what was `uncopied`, in its order."""
        self._copies.update(zip(map(id, self.uncopied()), copies, strict=True))

    def in_host_memory(self, name: str) -> torch.Tensor:
        """The values of a tensor there, without a way back for gradients."""
        tensor = self.tensors[name]
        return self._copies.get(id(tensor), tensor).detach()

    @cached_property
    def _on_devices(self) -> Sequence[torch.Tensor]:
        return tuple({id(t): t for t in self.tensors.values() if t.device.type != "cpu"}.values())

    def bundle(self, blocks: range) -> AdapterBundle | None:
        """The bundle for a span; `None` when no adapter is on its blocks."""
        if blocks not in self._bundles:
            if blocks not in self._layouts:
                self._layouts[blocks] = self._lay_out(blocks)
            layout = self._layouts[blocks]
            self._bundles[blocks] = layout.bundle(self._copies) if layout else None
        return self._bundles[blocks]

    def _lay_out(self, blocks: range) -> _Layout | None:
        specs = tuple(spec for spec in (_restrict(spec, blocks) for spec in self.specs) if spec)
        if not specs:
            return None
        mine = {name: tensor for name, tensor in self.tensors.items() if _block(name) in blocks}
        unique = {id(tensor): tensor for tensor in mine.values()}
        numbers = {key: number for number, key in enumerate(unique)}
        trainable = tuple(name for name in self.trainable if name in mine)
        manifest = Manifest(
            adapters=specs,
            scaling={name: dict(factors) for name, factors in self.scaling.items() if _block(name) in blocks},
            tensors={name: numbers[id(tensor)] for name, tensor in mine.items()},
            trainable=trainable,
        )
        return _Layout(manifest.to_json(), tuple(unique.values()), bool(trainable))


def _block(name: str) -> int:
    return int(name.partition(".")[0])


def _restrict(spec: AdapterSpec, blocks: range) -> AdapterSpec | None:
    """An adapter on some blocks only; `None` where it is on none of them."""
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
