"""Making the model that a user asked for."""

from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from client.model.build import build_model
from client.model.options import take_loading_options
from client.model.petals import with_prompts
from client.model.pseudo_layer import refuse_outputs
from client.model.saving import base_of, load_generation_config, name_base
from client.swarm.config import SwarmConfig
from client.swarm.membership import Membership
from client.swarm.membership import joining as joining_of
from client.swarm.swarm import Swarm
from client.swarm.weights import open_model
from protocol.errors import BadUsage
from protocol.model.checkpoint import Checkpoint, Hub, is_here, may_be_on_hub
from protocol.model.classes import class_for, config_for
from protocol.tensors import COMPUTE_DTYPES

_HELD_HERE = {
    "num_labels", "id2label", "label2id", "problem_type", "classifier_dropout", "initializer_range", "vocab_size",
    "tie_word_embeddings", "embd_pdrop", "final_logit_softcapping", "logit_scale", "logits_scaling",
    "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip
"""Fields of a configuration that speak of embeddings, heads, tokens and outputs only: no block computes by them."""


def load_distributed(
    cls: type[PreTrainedModel] | None,
    mapping: str,
    model: str,
    network: SwarmConfig,
    joining: Future[Membership],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    tuning_mode: str | None = None,
    pre_seq_len: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """A Transformers model whose blocks run on a swarm; see `AutoDistributedModelForCausalLM.from_pretrained`.

    `cls` None: the class that Transformers' auto mapping of the name `mapping` has for the model.
    """
    hub, place = take_loading_options(options)
    checkpoint = open_model(str(model), revision, hub, joining)
    cls, config = _class_of(checkpoint, cls, mapping)
    for name, value in options.items():
        _override(config, name, value)
    for part in config, config.get_text_config():
        refuse_outputs(part, {})
    base = base_of(checkpoint, partial(open_model, joining=joining))
    swarm = Swarm.connect(network, base, joining)
    with torch.device("cpu"):  # whatever torch.set_default_device says: it is read and tried out there
        built = build_model(cls, checkpoint, config, swarm, _dtype(dtype or torch_dtype, checkpoint))
    built.config._name_or_path = built.name_or_path = checkpoint.name
    name_base(built, base)
    load_generation_config(built, checkpoint)
    if place is not None:
        place.take(built)
    return with_prompts(built, tuning_mode, pre_seq_len) if tuning_mode else built


def local_name(model: str, revision: str | None = None, **network: Any) -> str:
    """A folder with configuration and tokenizer, for a model that this machine has or gets from the swarm.

    Any other name, of a folder or of the hub, as it is. `network`: fields of `SwarmConfig`. Raises as `open_model`.
    """
    if revision is not None or is_here(model) or not may_be_on_hub(model):
        return model
    with joining_of(SwarmConfig.make(None, **network)) as joined:
        return open_model(model, revision, Hub(), joined).name


def _class_of(
    checkpoint: Checkpoint, cls: type[PreTrainedModel] | None, mapping: str
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class to make, and its configuration; `cls`: the one that the user named.

    Raises `UnsupportedModel` when Transformers has none, `BadUsage` for one of another family.
    """
    if cls is None:
        return class_for(checkpoint, mapping)
    config = config_for(cls, checkpoint.config)
    if config is None:
        kind, known = checkpoint.config.model_type, getattr(cls.config_class, "model_type", None)
        raise BadUsage(
            f"{checkpoint.name} is a {kind} model, and {cls.__name__} runs {known} models; "
            "use the class of its family, or an AutoDistributedModel."
        )
    return cls, config


def named_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as a dtype. Raises `BadUsage`."""
    if name not in COMPUTE_DTYPES:
        raise BadUsage(f"dtype {name!r} is unknown; expected one of {', '.join(COMPUTE_DTYPES)}.")
    return COMPUTE_DTYPES[name]


def _override(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Set a field of the configuration where peers need not know of it, as they never will.

    Raises `BadUsage` for any other: the blocks would run without it, and nobody would notice.
    """
    if not hasattr(config, name):
        raise BadUsage(f"{name!r} is neither an option of the swarm nor of {type(config).__name__}.")
    if name not in _HELD_HERE and getattr(config, name) != value and not _leaves_blocks_out(config, name, value):
        raise BadUsage(
            f"{name!r} changes the blocks, which the peers run as the checkpoint's config.json says; "
            "serve a checkpoint that has it."
        )
    setattr(config, name, value)


def _leaves_blocks_out(config: PreTrainedConfig, name: str, value: Any) -> bool:
    """Whether this asks for the first blocks only, which routes then go through."""
    own = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return name in (own, "num_hidden_layers") and isinstance(value, int) and 0 < value <= getattr(config, own)


def _dtype(asked: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    if asked is None or asked == "auto":
        return checkpoint.dtype
    return named_dtype(asked) if isinstance(asked, str) else asked
