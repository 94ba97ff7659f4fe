"""Arguments of `from_pretrained` as Transformers and Petals have them: what they mean for what this machine holds."""

import logging
from functools import cache
from typing import Any

import torch

from protocol.errors import BadUsage, first_line
from protocol.model.checkpoint import Hub

logger = logging.getLogger(__name__)

_OTHER_NAMES = {"use_auth_token": "token", "allowed_servers": "allowed_peers", "blocked_servers": "blocked_peers"}
"""Earlier names of Transformers, and Petals' names."""
_ALWAYS = ("low_cpu_mem_usage", "weights_only")
"""What is done whether it is asked for or not."""
_NO_EFFECT = {
    "attn_implementation": "attention is computed by the peers, each as it can",
    "max_memory": "what this machine holds goes to one device",
    "offload_folder": "nothing is offloaded",
    "offload_state_dict": "nothing is offloaded",
    "offload_buffers": "nothing is offloaded",
    "trust_remote_code": "peers run Transformers' own code for the model, and so does this machine",
}
_QUANTIZED = ("quantization_config", "load_in_4bit", "load_in_8bit")
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def rename(options: dict[str, Any]) -> dict[str, Any]:
    """The options under this library's names. Raises `BadUsage` for one that is given under both."""
    renamed = {_OTHER_NAMES.get(name, name): value for name, value in options.items()}
    if len(renamed) < len(options):
        name = next(name for name in _OTHER_NAMES if name in options and _OTHER_NAMES[name] in options)
        raise BadUsage(f"{name} is another name of {_OTHER_NAMES[name]}; give one of them.")
    return renamed


def take_loading_options(options: dict[str, Any]) -> tuple[Hub, torch.device | None]:
    """Take out of `options` what concerns loading: where files come from, and the device that `device_map` names.

    Says once of each what has no effect. Raises `BadUsage` for what would mislead.
    """
    for name in _QUANTIZED:
        if options.pop(name, None):
            raise BadUsage(
                f"{name}: the blocks are as their peers quantize them (`peer serve --quantize nf4`), and what this "
                "machine holds is not quantized; leave it out."
            )
    if options.pop("use_safetensors", None) is False:
        raise BadUsage("Weights are read in the safetensors format only; leave out use_safetensors=False.")
    if options.pop("active_adapter", None):
        raise BadUsage(
            "active_adapter: adapters are yours and not the peers'; use PeftModel.from_pretrained(model, ...)."
        )
    for name in _ALWAYS:
        options.pop(name, None)
    for name, reason in _NO_EFFECT.items():
        if options.pop(name, None):
            _say(name, reason)
    hub = Hub(**{name: options.pop(name) for name in Hub.__dataclass_fields__ if name in options})
    return hub, _device(options.pop("device_map", None))


@cache
def _say(name: str, reason: str) -> None:
    logger.warning("%s has no effect through a swarm: %s.", name, reason)


def _device(device_map: Any) -> torch.device | None:
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise BadUsage('What this machine holds goes to one device; give device_map="auto", or a device.')
        device_map = next(iter(device_map.values()))
    if device_map in _AUTOMATIC:
        device_map = torch.accelerator.current_accelerator() or "cpu"
    try:
        device = torch.device(device_map)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BadUsage(f"device_map {device_map!r} is no device of this machine ({first_line(error)}).") from error
    return device
