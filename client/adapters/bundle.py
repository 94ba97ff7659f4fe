"""TODO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from protocol.adapters import (
    PATTERNS,
    AdapterSpec,
    Manifest,
    bundle_hash,
)

if TYPE_CHECKING:  # it takes seconds to import
    pass


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
