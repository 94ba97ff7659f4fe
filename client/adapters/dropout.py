"""Which dropout is live: users and trainers switch modules off one by one, whatever the configuration says."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from client.adapters.attributes import Attributes
from protocol.adapters import DROPOUTS
from protocol.errors import BadUsage

if TYPE_CHECKING:  # it takes seconds to import
    from peft.tuners.tuners_utils import BaseTunerLayer

_OPTIONS = {option: option for option in DROPOUTS} | {"oft_dropout": "module_dropout"}
"""Attribute of a layer of PEFT's -> the option that it was made from."""


class BlockDropout:
    """The blocks' own dropout and noise. Peers know its rates from the checkpoint, and apply all of it or none."""

    def __init__(self, blocks: nn.Module):
        self._rates = [
            (f"{path}.{name}", owner, name, rate)
            for path, owner in blocks.named_modules()
            for name, value in (*owner.named_children(), *vars(owner).items())
            if (rate := _rate(name, value)) > 0
        ]
        self._seen: Attributes | None = None
        """What the last answer rested on."""
        self._is_live = False

    def __bool__(self) -> bool:
        """Whether the checkpoint has any."""
        return bool(self._rates)

    def is_live(self) -> bool:
        """Whether it is on now. Raises `BadUsage` where only some of it is, or at another rate."""
        if self._seen is None or self._seen.changed():
            self._seen, seen = None, Attributes(self._attributes())
            self._is_live = self._find_live()
            self._seen = seen
        return self._is_live

    def _find_live(self) -> bool:
        is_live, changed = False, None
        for path, owner, name, rate in self._rates:
            value = getattr(owner, name, None)
            found = _rate(name, value) if _switch(owner, value).training else 0.0
            is_live |= found > 0
            if found != rate:
                changed = changed or f"{path} is at {found} instead of {rate}"
        if is_live and changed:
            raise BadUsage(f"Peers draw the blocks' own dropout and noise as the checkpoint says, or none: {changed}.")
        return is_live

    def _attributes(self) -> Iterator[tuple[object, str]]:
        """What `_find_live` looks at."""
        for _, owner, name, _ in self._rates:
            value = getattr(owner, name, None)
            yield from ((owner, name), (value, "p"), (_switch(owner, value), "training"))


def _switch(owner: nn.Module, value: Any) -> nn.Module:
    """The module whose training mode decides whether a rate applies: a dropout module itself, or who holds a number."""
    return value if isinstance(value, nn.Module) else owner


def _rate(name: str, value: Any) -> float:
    """The rate of a child or an attribute of a module; 0.0 for what is neither dropout nor noise.

    Many models keep a rate as a number, which no switching of modules reaches; so do routers with their noise.
    """
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


def dropout_attributes(module: nn.Module) -> tuple[str, ...]:
    """The attributes of a layer of PEFT's, or of a module in one, that `adapter_dropout` depends on."""
    held = vars(module)
    if "p" in held:
        return "p", "training"
    if "rank_dropout" in held:
        return "rank_dropout", "module_dropout", "training"
    return ()
