"""The Transformers class that a checkpoint is a model of, as Transformers' auto classes choose it."""

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from protocol.errors import UnsupportedModel
from protocol.model.checkpoint import Checkpoint

CAUSAL_LM = "MODEL_FOR_CAUSAL_LM_MAPPING"
_MORE = {CAUSAL_LM: "MODEL_FOR_MULTIMODAL_LM_MAPPING"}
"""Mapping -> another one, with the classes of models that do the task and more."""


def class_for(checkpoint: Checkpoint, mapping: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that Transformers' auto mapping of the name `mapping` has for a checkpoint, and its configuration.

    For causal language models also the class of those that see or hear as well. Where the class is the language model
    alone, the configuration is that of the checkpoint's language model. Raises `UnsupportedModel` when there is none.
    """
    config = checkpoint.config
    for name in filter(None, (mapping, _MORE.get(mapping))):
        cls: type[PreTrainedModel] | None = getattr(modeling_auto, name).get(type(config), None)
        if cls is not None:
            return cls, config_for(cls, config) or config
    task = mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING").lower().replace("_", " ")
    raise UnsupportedModel(
        f"{checkpoint.name} is a {config.model_type} model, of which Transformers makes no model for {task}; "
        "expected a model of another family."
    )


def config_for(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The part of a checkpoint's configuration that a `cls` is made of: the whole, or that of its language model.

    `None`: neither is of the class's own kind.
    """
    known, text = cls.config_class, config.get_text_config()
    if known is None or isinstance(config, known):
        return config
    if not isinstance(text, known):
        return None
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = quantization
    return text
