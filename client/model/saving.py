"""What this machine holds of a model, saved and loaded without PEFT.

Transformers' `save_pretrained`, `Trainer` and `state_dict` do the work; they see no ghosts, and the configuration that
they write names the checkpoint whose blocks the swarm serves.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from client.ghosts.blocks import GhostBlocks
from client.ghosts.tensor import GhostTensor
from protocol.errors import BadUsage, UnsupportedModel, first_line
from protocol.model.checkpoint import Checkpoint, find_file, open_checkpoint

_BASE = "swarm_base"
_GENERATION = "generation_config.json"


def name_base(model: PreTrainedModel, base: Checkpoint) -> None:
    """Let what `model.save_pretrained` and `Trainer` write say which checkpoint the blocks are of."""
    folder = Path(base.name).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else base.name
    entry = {"name": name, "revision": base.revision, "config_hash": base.model_id.config_hash}
    setattr(model.config, _BASE, entry)


def base_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint whose blocks the swarm serves: `checkpoint` itself, or the one that it was saved from.

    Raises `UnsupportedModel` when that one is gone or is another by now.
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
        base = open_checkpoint(name, revision, checkpoint.hub)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"The base model of {checkpoint.name} cannot be opened ({error}); {advice}.") from error
    if base.model_id.config_hash != entry.get("config_hash"):
        raise UnsupportedModel(f"{name} is another model than the one that {checkpoint.name} was saved from; {advice}.")
    return base


def load_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Take over how the checkpoint wants to be sampled and where it stops, as `from_pretrained` does.

    Raises `UnsupportedModel` when its file cannot be used.
    """
    path = find_file(checkpoint.name, _GENERATION, checkpoint.revision, checkpoint.hub)
    if path is None or not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(path.parent)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedModel(
            f"{path} cannot be used ({first_line(error)}); download the model again, or remove this file."
        ) from error


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


def _ghost_names(blocks: nn.Module) -> Iterator[str]:
    members = (*blocks.named_parameters(remove_duplicate=False), *blocks.named_buffers(remove_duplicate=False))
    return (name for name, tensor in members if isinstance(tensor.data, GhostTensor))


def _leave_out(blocks: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in _ghost_names(blocks):
        state_dict.pop(prefix + name, None)


def _expect(blocks: nn.Module, state_dict: dict[str, Any], prefix: str, *_rest: Any) -> None:
    absent = {prefix + name for name in _ghost_names(blocks)}
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
    loss = getattr(output, "loss", None)
    if model.training and torch.is_grad_enabled() and loss is not None and not loss.requires_grad:
        raise BadUsage(
            "Nothing of this model is being trained: its blocks live on remote peers, so full fine-tuning is not "
            "possible; use a PEFT adapter, or set requires_grad for weights that this machine holds, such as "
            f"{_held_name(model)}."
        )


def _held_name(model: nn.Module) -> str:
    """The weight that somebody is likely to want to train: the last one outside of the blocks, mostly the head's."""
    return [name for name, tensor in model.named_parameters() if not isinstance(tensor.data, GhostTensor)][-1]
