"""The model classes that users name."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from client.build import build_model
from client.config import SwarmConfig
from client.saving import base_of, load_generation_config, name_base
from client.swarm import Swarm
from protocol.errors import BadUsage, UnsupportedModel
from protocol.model.checkpoint import Checkpoint, open_checkpoint
from protocol.model.loading import class_for


def load_distributed(
    cls: type[PreTrainedModel] | None,
    mapping: "_LazyAutoMapping",
    model: str,
    *,
    swarm_config: SwarmConfig | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A Transformers model whose blocks run on a swarm; see `AutoDistributedModelForCausalLM.from_pretrained`."""
    network = {name: options.pop(name) for name in SwarmConfig.model_fields if name in options}
    network_config = SwarmConfig.make(swarm_config, **network)
    checkpoint = open_checkpoint(str(model), revision)
    config = checkpoint.config
    for name, value in options.items():
        if not hasattr(config, name):
            raise BadUsage(f"{name!r} is neither an option of the swarm nor of {type(config).__name__}.")
        setattr(config, name, value)
    if cls is None:
        cls = class_for(config, mapping)
    if cls is None:
        raise UnsupportedModel(f"{model} is a {config.model_type} model, which Transformers has no such task for.")
    base = base_of(checkpoint)
    swarm = Swarm.connect(network_config, base)
    built = build_model(cls, checkpoint, config, swarm, _dtype(dtype or torch_dtype, checkpoint))
    built.config._name_or_path = built.name_or_path = str(model)
    name_base(built, base)
    load_generation_config(built, checkpoint)
    return built


class _AutoDistributed:
    """Makes a Transformers model of the right class whose blocks run on a swarm."""

    _mapping: _LazyAutoMapping

    def __init__(self) -> None:
        raise BadUsage(f"{type(self).__name__} is not constructed; use {type(self).__name__}.from_pretrained(...).")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **options: Any) -> PreTrainedModel:
        """A model that holds what lies outside of the blocks and runs the blocks on the peers of a swarm.

        Also of a folder that `save_pretrained` of such a model, or a `Trainer` with it, has written. Nothing requires
        gradients until a PEFT adapter is put on it or `requires_grad` is set for a weight that is on this machine.

        `options`: the fields of `SwarmConfig` (`initial_peers=[...]` above all), or `swarm_config=` whole; `revision`;
        `dtype` of what this machine holds (default: the checkpoint's); fields of the model's configuration
        (`num_labels=3`). Raises `BadUsage`, `UnsupportedModel`, `PeerUnreachable`; a call of the model may raise
        `NoRoute` and other `protocol.errors`.
        """
        return load_distributed(None, cls._mapping, pretrained_model_name_or_path, **options)


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """Causal language models."""

    _mapping = MODEL_FOR_CAUSAL_LM_MAPPING


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """Sequence classifiers; the head is on this machine."""

    _mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


class AutoDistributedModelForTokenClassification(_AutoDistributed):
    """Token classifiers; the head is on this machine."""

    _mapping = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


def distributed_class(name: str) -> type[_AutoDistributed]:
    """`DistributedBloomForCausalLM` and its like: for any class that Transformers has. Raises `AttributeError`."""
    base = getattr(transformers, name.removeprefix("Distributed"), None)
    if not name.startswith("Distributed") or not isinstance(base, type) or not issubclass(base, PreTrainedModel):
        raise AttributeError(f"module 'client' has no attribute {name!r}")

    def from_pretrained(cls: Any, pretrained_model_name_or_path: str, /, **options: Any) -> Any:
        return load_distributed(base, MODEL_FOR_CAUSAL_LM_MAPPING, pretrained_model_name_or_path, **options)

    doc = f"A {base.__name__} whose blocks run on a swarm."
    return type(name, (_AutoDistributed,), {"from_pretrained": classmethod(from_pretrained), "__doc__": doc})


def named_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as a dtype. Raises `BadUsage`."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise BadUsage(f"dtype {name!r} is unknown; expected one of {', '.join(names)}.")
    return names[name]


def _dtype(asked: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    if asked is None or asked == "auto":
        return checkpoint.dtype
    return named_dtype(asked) if isinstance(asked, str) else asked
