"""The adapters that PEFT put on the ghosts, as bundles for the wire.

Collecting them costs milliseconds on a large model, so what was collected is kept until modules or states change.
Values are another matter: fused optimizers and `.data` change a parameter without touching its `_version`, so
every call hashes them anew, but for the decode steps of a generation: these trust the versions.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from client.adapters.bundle import Snapshot
from client.adapters.dropout import adapter_dropout
from client.adapters.peft_layers import _active, _tensors
from client.adapters.shifts import shift_adapter
from client.adapters.spec import _spec
from client.adapters.watch import _Watch
from protocol.adapters import (
    AdapterSpec,
)
from protocol.errors import BadAdapter

if TYPE_CHECKING:  # it takes seconds to import
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


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
