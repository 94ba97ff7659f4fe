"""Rotary embeddings whose frequencies depend on the longest sequence so far: here, on that of one trunk pass.

Transformers keeps the frequencies of the last pass on the module. A span has one such module for all of its clients,
and no client's result may depend on how long another's sequence was.
"""

from typing import Any

from torch import nn

from protocol.model.forwards import before_each_call


def forget_between_calls(model: nn.Module) -> None:
    """Have every "dynamic" rotary embedding of `model`, and of its copies, begin each call with its own frequencies."""
    for module in model.modules():
        if any("dynamic" in rope_type for rope_type in rope_types(module).values()):
            before_each_call(module, _begin_anew)


def rope_types(module: nn.Module) -> dict[str, str]:
    """The types of rotary embeddings that a module makes, by the prefix of its attributes for each."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, dict):  # one for each type of layer
        return {f"{layer_type}_": rope_type for layer_type, rope_type in found.items()}
    return {"": found} if isinstance(found, str) else {}


def _begin_anew(module: Any, arguments: Any) -> None:
    for prefix, rope_type in rope_types(module).items():
        if "dynamic" in rope_type:
            device = getattr(module, f"{prefix}inv_freq").device  # the original stays where the module was made
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
