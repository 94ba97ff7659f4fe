"""Making the model that a user asked for."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from client.build import build_model
from client.config import SwarmConfig
from client.saving import base_of, load_generation_config, name_base
from client.swarm import Swarm
from protocol.errors import BadUsage, UnsupportedModel
from protocol.model.checkpoint import Checkpoint, open_checkpoint
from protocol.model.loading import class_for
from protocol.tensors import COMPUTE_DTYPES


def load_distributed(
    cls: type[PreTrainedModel] | None,
    mapping: str,
    model: str,
    *,
    swarm_config: SwarmConfig | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A Transformers model whose blocks run on a swarm; see `AutoDistributedModelForCausalLM.from_pretrained`.

    `cls` None: the class that Transformers' auto mapping of the name `mapping` has for the model.
    """
    network = {name: options.pop(name) for name in SwarmConfig.model_fields if name in options}
    network_config = SwarmConfig.make(swarm_config, **network)
    checkpoint = open_checkpoint(str(model), revision)
    config = checkpoint.config
    for name, value in options.items():
        if not hasattr(config, name):
            raise BadUsage(f"{name!r} is neither an option of the swarm nor of {type(config).__name__}.")
        setattr(config, name, value)
    if cls is None:
        cls = class_for(config, getattr(modeling_auto, mapping))
    if cls is None:
        raise UnsupportedModel(f"{model} is a {config.model_type} model, which Transformers has no such task for.")
    base = base_of(checkpoint)
    swarm = Swarm.connect(network_config, base)
    built = build_model(cls, checkpoint, config, swarm, _dtype(dtype or torch_dtype, checkpoint))
    built.config._name_or_path = built.name_or_path = str(model)
    name_base(built, base)
    load_generation_config(built, checkpoint)
    return built


def named_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as a dtype. Raises `BadUsage`."""
    if name not in COMPUTE_DTYPES:
        raise BadUsage(f"dtype {name!r} is unknown; expected one of {', '.join(COMPUTE_DTYPES)}.")
    return COMPUTE_DTYPES[name]


def _dtype(asked: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    if asked is None or asked == "auto":
        return checkpoint.dtype
    return named_dtype(asked) if isinstance(asked, str) else asked
