"""The ghost blocks as they were loaded, which is how peers run them, and what has become of them since."""

from collections.abc import Iterator

import torch
from torch import nn

from client.adapters.attributes import Attributes

_WRAPPED = ".base_layer"
"""PEFT's layers hold what they are put on under this name, some of them several times over."""
_NO_SETTINGS = ("training", "gradient_checkpointing")
"""Attributes of modules that may change: what they say is said to peers, or concerns this machine only."""
_MASKS = ("is_causal", "sliding_window", "attention_chunk_size", "layer_types", "use_bidirectional_attention")
"""Fields of a configuration that trunks read in every forward, to make the blocks' masks by them."""


class Original:
    """Which modules and tensors the blocks had, where, and with which settings. To be made before anybody changes them.

    `config`: the trunk's configuration.
    """

    def __init__(self, blocks: nn.ModuleList, config: object):
        self._modules = dict(blocks.named_modules(remove_duplicate=False))
        self._known = frozenset(self._modules.values())
        self._tensors = frozenset(
            f"{path}.{name}" for path, module in self._modules.items() for name, _ in own_tensors(module)
        )
        settings: list[tuple[str, object, str]] = [(f"config.{name}", config, name) for name in _MASKS]
        for path, module in self._modules.items():
            settings += [(f"{path}.{name}", module, name) for name in _settings(module)]
        self._names = [name for name, _, _ in settings]
        self._settings = Attributes((owner, name) for _, owner, name in settings)

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._known

    def misplaced(self, blocks: nn.ModuleList) -> str | None:
        """A module or a tensor that is not where it was; blocks may be missing at the end."""
        paths = dict[str, nn.Module]()
        for path, module in blocks.named_modules(remove_duplicate=False):
            if module in self._known:
                paths[path.replace(_WRAPPED, "")] = module
        tensors = {f"{path}.{name}" for path, module in paths.items() for name, _ in own_tensors(module)}
        left = range(len(blocks))
        moved = (path for path, module in paths.items() if self._modules.get(path) is not module)
        gone = (path for path in self._modules if path not in paths and _block(path) in left)
        lost = (name for name in self._tensors if name not in tensors and _block(name) in left)
        return next(moved, None) or next(gone, None) or min(lost, default=None)

    def changed_setting(self) -> str | None:
        """What an attribute of a module was and is, if one has changed: a number, a switch or a name."""
        if not self._settings.changed():
            return None
        number, before, now = self._settings.first_change()
        return f"{self._names[number]} was {before!r} when the model was loaded, and is {now!r}"


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's parameters and buffers, without its children's."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def _settings(module: nn.Module) -> Iterator[str]:
    """Attributes that a forward may compute by. Dropout is looked after elsewhere: it may be switched off."""
    if isinstance(module, nn.Dropout):
        return
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NO_SETTINGS or "drop" in name or "jitter" in name:
            continue
        if value is None or isinstance(value, bool | int | float | str):
            yield name


def _block(path: str) -> int:
    return int(path.partition(".")[0]) if path else -1
