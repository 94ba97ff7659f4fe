"""Rotary embeddings whose frequencies depend on the longest sequence so far: here on the call alone.

Transformers keeps on the module what the last call made of them. A span has one such module for all of its clients, and
none of them is to compute with what another's positions left behind.
"""

from typing import Any

from torch import nn

from protocol.machine.forwards import before_each_call


def forget_between_calls(model: nn.Module) -> None:
    """Let every "dynamic" rotary embedding of `model`, and of copies of it, begin each call as it was made."""
    for module in model.modules():
        if any("dynamic" in kind for kind in rope_types(module).values()):
            before_each_call(module, _begin_anew)


def rope_types(module: nn.Module) -> dict[str, str]:
    """The kinds of rotary embeddings that a module makes, by what its attributes for each begin with."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, dict):  # one for each type of layer
        return {f"{layer_type}_": kind for layer_type, kind in found.items()}
    return {"": found} if isinstance(found, str) else {}


def _begin_anew(module: Any, arguments: Any) -> None:
    for prefix, kind in rope_types(module).items():
        if "dynamic" in kind:
            device = getattr(module, f"{prefix}inv_freq").device  # the original stays where the module was made
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
