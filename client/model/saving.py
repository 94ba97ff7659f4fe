"""What this machine holds of a model, saved and loaded without PEFT.

Transformers' `save_pretrained`, `Trainer` and `state_dict` do the work; they see no ghosts, and the configuration that
they write names the checkpoint whose blocks the swarm serves.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from client.ghosts.blocks import GhostBlocks, ghost_names
from client.ghosts.tensor import GhostTensor
from protocol.errors import BadUsage, UnsupportedModel, first_line
from protocol.model.checkpoint import Checkpoint, Hub, find_file

_log = logging.getLogger(__name__)
_BASE = "swarm_base"
_GENERATION = "generation_config.json"
_WARNED = "_warned_of_idle_training"


def name_base(model: PreTrainedModel, base: Checkpoint) -> None:
    """Let what `model.save_pretrained` and `Trainer` write say which checkpoint the blocks are of."""
    folder = Path(base.name)
    name = str(folder.resolve()) if folder.is_dir() else base.name
    name = base.source.label if base.source is not None else name
    entry = {"name": name, "revision": base.revision, "config_hash": base.model_id.config_hash}
    setattr(model.config, _BASE, entry)


def base_of(checkpoint: Checkpoint, open_model: Callable[[str, str | None, Hub], Checkpoint]) -> Checkpoint:
    """The checkpoint whose blocks the swarm serves: `checkpoint` itself, or the one that it was saved from.

    `open_model` opens that by name and revision. Raises `UnsupportedModel` when it is gone or is another by now.
    """
    if _BASE not in checkpoint.raw_config:
        return checkpoint
    entry = checkpoint.raw_config[_BASE]
    name = entry.get("name") if isinstance(entry, dict) else None
    revision = entry.get("revision") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise UnsupportedModel(f"{checkpoint.name}: {_BASE} in its config.json names no model; save the model again.")
    advice = f"if it has moved, put its new place into {_BASE} in the config.json of {checkpoint.name}"
    try:
        base = open_model(name, revision, checkpoint.hub)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"The base model of {checkpoint.name} cannot be opened ({error}); {advice}.") from error
    if base.model_id.config_hash != entry.get("config_hash"):
        raise UnsupportedModel(f"{name} is another model than the one that {checkpoint.name} was saved from; {advice}.")
    return base


def load_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Take over how the checkpoint wants to be sampled and where it stops, as `from_pretrained` does.

    What it says of the cache is left out, and logged: that changes no token where a cache is on the peers.
    Raises `UnsupportedModel` when its file cannot be used.
    """
    path = find_file(checkpoint.name, _GENERATION, checkpoint.revision, checkpoint.hub)
    if path is None or not model.can_generate():
        return
    try:
        asked = GenerationConfig.from_pretrained(path.parent)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"{path} cannot be used ({first_line(error)}); download the model again, or remove this file."
        ) from error
    if asked.cache_implementation is not None:
        if not asked.cache_implementation.startswith("dynamic"):
            _log.warning(
                "%s asks for cache_implementation=%r, which is left out: the cache is the peers'.",
                path, asked.cache_implementation,
            )  # fmt: skip
        asked.cache_implementation = asked.cache_config = asked.max_cache_len = None
    model.generation_config = asked


def hide_ghosts(ghosts: GhostBlocks) -> None:
    """Keep ghosts out of state dicts, and let state dicts without them load, also strictly."""
    ghosts.register_state_dict_post_hook(_leave_out)
    ghosts.register_load_state_dict_pre_hook(_expect)
    ghosts.register_load_state_dict_post_hook(_excuse)


def freeze(model: PreTrainedModel) -> None:
    """Nothing is trained but what somebody asks for; a training call that trains nothing is refused.

    With the weights outside of the blocks trainable from the start, as Transformers has it, full fine-tuning would seem
    to work and would leave the blocks as they are.
    """
    model.requires_grad_(False)
    model.register_forward_hook(_refuse_idle_training)


def _leave_out(blocks: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in ghost_names(blocks):
        state_dict.pop(prefix + name, None)


def _expect(blocks: nn.Module, state_dict: dict[str, Any], prefix: str, *_rest: Any) -> None:
    absent = {prefix + name for name in ghost_names(blocks)}
    given = sorted(absent & state_dict.keys())
    if given:
        raise BadUsage(
            f"This state dict holds weights of the transformer blocks, such as {given[0]}, which live on remote peers "
            "and cannot be loaded here; leave them out."
        )
    blocks._absent = absent  # type: ignore[assignment]


def _excuse(blocks: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in blocks._absent]  # type: ignore[operator]


def _refuse_idle_training(model: nn.Module, _args: Any, output: Any) -> None:
    """Refuses a loss, and warns once of logits: they may be wanted as they are, and torch will not say what is wrong.

    A model whose adapters are switched off is somebody's reference, which needs no gradient.
    """
    loss = getattr(output, "loss", None)
    result = getattr(output, "logits", None) if loss is None else loss
    if not model.training or not torch.is_grad_enabled() or result is None or result.requires_grad:
        return
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        return
    message = (
        "Nothing of this model is being trained: its blocks live on remote peers, so full fine-tuning is not possible; "
        "use a PEFT adapter (loaded with is_trainable=True), or set requires_grad for weights that this machine holds, "
        f"such as {_held_name(model)}."
    )
    if loss is not None:
        raise BadUsage(message)
    if not getattr(model, _WARNED, False):
        setattr(model, _WARNED, True)
        _log.warning(message)


def _held_name(model: nn.Module) -> str:
    """The weight that somebody is likely to want to train: the last one outside of the blocks, mostly the head's."""
    return [name for name, tensor in model.named_parameters() if not isinstance(tensor.data, GhostTensor)][-1]
