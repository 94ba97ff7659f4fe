"""Which dropout is live: users and trainers switch modules off one by one, whatever the configuration says."""

from typing import TYPE_CHECKING, Any

from torch import nn

from protocol.adapters import DROPOUTS
from protocol.errors import BadUsage

if TYPE_CHECKING:  # it takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

_OPTIONS = {option: option for option in DROPOUTS} | {"oft_dropout": "module_dropout"}
"""Attribute of a layer of PEFT's -> the option that it was made from."""


class BlockDropout:
    """What the blocks draw of their own in training mode. Peers know it from the checkpoint: all of it, or nothing."""

    def __init__(self, blocks: nn.Module):
        self._rates = [
            (f"{path}.{name}", owner, name, rate)
            for path, owner in blocks.named_modules()
            for name, value in (*owner.named_children(), *vars(owner).items())
            if (rate := _rate(name, value)) > 0
        ]

    def __bool__(self) -> bool:
        """Whether the checkpoint has any."""
        return bool(self._rates)

    def is_live(self) -> bool:
        """Whether it is on now. Raises `BadUsage` where only some of it is, or at another rate."""
        is_live, changed = False, None
        for path, owner, name, rate in self._rates:
            value = getattr(owner, name, None)
            switch = value if isinstance(value, nn.Module) else owner
            found = _rate(name, value) if switch.training else 0.0
            is_live |= found > 0
            if found != rate:
                changed = changed or f"{path} is at {found} instead of {rate}"
        if is_live and changed:
            raise BadUsage(f"Peers draw the blocks' own dropout and noise as the checkpoint says, or none: {changed}.")
        return is_live


def _rate(name: str, value: Any) -> float:
    """Many models keep a rate as a number, which no switching of modules reaches; so do routers with their noise."""
    if isinstance(value, nn.Dropout):
        return value.p
    return value if isinstance(value, float) and ("drop" in name or "jitter" in name) else 0.0


def adapter_dropout(layer: "BaseTunerLayer", adapter: str) -> dict[str, tuple[float, bool]]:
    """Option -> its rate, and whether it applies now."""
    found = {}
    for attribute, option in _OPTIONS.items():
        if adapter in (held := getattr(layer, attribute, {})):
            value = held[adapter]
            is_module = isinstance(value, nn.Module)
            found[option] = (getattr(value, "p", 0.0), value.training) if is_module else (value, layer.training)
    return found


def dropout_state(module: nn.Module) -> tuple[Any, ...] | None:
    """What a change of dropout in a part of an adapter's changes; `None` where there is nothing to change.

    Asked for every step of a generation, so without looking for attributes that a module does not have.
    """
    held = vars(module)
    if "p" in held:
        return held["p"], module.training
    if "rank_dropout" in held:
        return dict(held["rank_dropout"]), dict(held["module_dropout"]), module.training
    return None
