"""Arguments of `from_pretrained` as Transformers and Petals have them: what they mean for what this machine holds."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from protocol.errors import BadUsage
from protocol.machine.devices import choose_device
from protocol.model.checkpoint import Hub

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Place:
    """The device for what this machine holds of a model."""

    device: torch.device
    is_asked_for: bool = True
    """Whether the user named it, so that nothing else will do."""

    def take(self, model: PreTrainedModel) -> None:
        """Move a model there. One that does not fit stays on the CPU, which is logged, unless the device is asked for.

        Raises `BadUsage`.
        """
        try:
            model.to(self.device)  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            model.to("cpu")  # type: ignore[arg-type]
            size = f"{model.get_memory_footprint() / 2**30:,.1f} GiB"
            if self.is_asked_for:
                raise BadUsage(
                    f"What this machine holds of the model takes {size}, and {self.device} has less than that free; "
                    "use another device, or the CPU."
                ) from error
            logger.warning("%s has no room for the %s that this machine holds of the model.", self.device, size)


def take_loading_options(options: dict[str, Any]) -> tuple[Hub, Place | None]:
    """Take out of `options` what concerns loading: where files come from, and what `device` or `device_map` name.

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
    return hub, _place(options.pop("device", None), options.pop("device_map", None))


@cache
def _say(name: str, reason: str) -> None:
    logger.warning("%s has no effect through a swarm: %s.", name, reason)


def _place(device: Any, device_map: Any) -> Place | None:
    if device is not None and device_map is not None:
        raise BadUsage("device and device_map say the same here; give one of them.")
    asked = device_map if device is None else device
    if isinstance(asked, dict):
        if len(set(map(str, asked.values()))) != 1:
            raise BadUsage('What this machine holds goes to one device; give device="auto", or a device.')
        asked = next(iter(asked.values()))
    if asked is None:
        default = torch.get_default_device()
        return None if default.type in ("cpu", "meta") else Place(default)
    if asked in _AUTOMATIC:
        return Place(choose_device("auto"), is_asked_for=False)
    if isinstance(asked, int):
        kind = torch.accelerator.current_accelerator() or torch.device("cuda")
        asked = torch.device(kind.type, asked) if asked >= 0 else asked
    return Place(choose_device(str(asked)))
