"""The adapters that PEFT put on the ghost blocks, found and kept for as long as they stay as they are.

Collecting them costs milliseconds on a large model, so a snapshot is kept until modules or settings change. The values
of tensors need more care: fused optimizers and `.data` change a parameter without counting up its `_version`. So every
snapshot has its values hashed anew, but for the decode steps of a generation, which trust the versions.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from client.adapters.bundle import Snapshot
from client.adapters.dropout import adapter_dropout
from client.adapters.original import Original
from client.adapters.peft_layers import active_adapters, adapter_tensors
from client.adapters.residual import ResidualAdapter, residual_adapter
from client.adapters.spec import spec_of
from client.adapters.watch import Watch
from protocol.adapters import AdapterSpec
from protocol.errors import BadAdapter

if TYPE_CHECKING:  # it takes seconds to import
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


class AdapterSource:
    """Finds the adapters on the ghost blocks of a model. To be made before any is put there."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList):
        self._model, self._blocks = model, blocks
        self._original = Original(blocks, model.config.get_text_config())
        self._watch: Watch | None = None
        self._snapshot: Snapshot | None = None

    def snapshot(self, fresh: bool, training: bool) -> Snapshot | None:
        """The active adapters now; `None` without any. `fresh`: do not trust that unchanged versions mean equal values.

        `training`: whether the blocks are in training mode. Else adapters are sent with dropout that is not live, too:
        it drops nothing then, and they are the same bundles as in training.

        Raises `BadAdapter` and `BadUsage` for what cannot travel; `BadUsage` only where `fresh`.
        """
        watch = self._watch
        if fresh and watch is not None:
            watch.refuse_misuse()
        if watch is None or watch.training != training or watch.changed() or (fresh and watch.reshaped()):
            self._watch, watch = None, Watch(self._blocks, self._original, training)
            watch.refuse_misuse()
            self._snapshot = self._collect(watch.layers, training)
            self._watch = watch
        elif (watch.take_edits() or fresh) and self._snapshot is not None:
            self._snapshot = self._snapshot.with_new_values()
        return self._snapshot

    def _collect(self, layers: "Mapping[str, BaseTunerLayer]", training: bool) -> Snapshot | None:
        active = active_adapters(layers)
        has_dropout = any(
            is_live and rate > 0
            for name, on in active.items()
            for layer in on.values()
            for rate, is_live in adapter_dropout(layer, name).values()
        )
        configs: Mapping[str, PeftConfig] = self._model.peft_config if active else {}  # type: ignore[assignment]
        specs, tensors = list[AdapterSpec](), dict[str, torch.Tensor]()
        scaling = dict[str, dict[str, float]]()
        for number, (name, on) in enumerate(active.items()):
            alias = f"a{number}"  # users' names may have characters that must not travel, and tell peers nothing
            specs.append(spec_of(name, alias, configs[name], on, training or has_dropout))
            for path, layer in on.items():
                tensors |= adapter_tensors(path, layer, name, alias)
                if isinstance(factors := getattr(layer, "scaling", None), dict) and name in factors:
                    scaling.setdefault(path, {})[alias] = float(factors[name])
        snapshot = Snapshot(tuple(specs), scaling, tensors, has_dropout)
        if (residual := residual_adapter(self._blocks)) is not None:
            return _with_residual(snapshot, residual)
        return snapshot if specs else None


def _with_residual(snapshot: Snapshot, residual: ResidualAdapter) -> Snapshot:
    if any(spec.options.get("use_dora") for spec in snapshot.specs):
        raise BadAdapter(
            "use_dora=True does not work on weights that PiSSA or OLoRA has changed; use one or the other."
        )
    own = {path: {residual.spec.name: factor} for path, factor in residual.scaling.items()}
    return Snapshot(
        specs=(residual.spec, *snapshot.specs),  # first, for the least rounding: it mostly cancels what comes after
        scaling={path: {**snapshot.scaling.get(path, {}), **own.get(path, {})} for path in {**snapshot.scaling, **own}},
        tensors={**snapshot.tensors, **residual.tensors},
        has_dropout=snapshot.has_dropout,
    )
