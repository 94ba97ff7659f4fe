"""Which tensors of a checkpoint become which parameters of the model: Transformers' own renames and fusions, both ways.

Transformers 5 renames some families' tensors on loading and fuses the experts of a mixture into one parameter;
`save_pretrained` undoes it. Here the same rules (transformers.core_model_loading) run on a few tensors at a time.
"""

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from client.merge.base import MergeError


@dataclass(eq=False)
class Group:
    """Tensors that are converted together: mostly one; for fused experts all of a block's."""

    params: tuple[str, ...]
    keys: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None


class Names:
    """The map between the checkpoint's `keys` and the names in `layout`, a model on the meta device."""

    def __init__(self, layout: tf.PreTrainedModel, keys: Iterable[str]) -> None:
        self._layout = layout
        self._state: dict[str, torch.Tensor] = layout.state_dict()
        self._rules: list[Any] = get_model_conversion_mapping(layout)
        self.of_key: dict[str, Group] = {}
        self.of_param: dict[str, Group] = {}
        for key in sorted(keys, key=dot_natural_key):
            self._place(key)
        # Only the rules that matched may be undone: see `WeightTransform.was_used`.
        setattr(layout, "_weight_conversions", [rule for rule in self._rules if rule.was_used()])  # noqa: B010
        self.twins = _twins(layout)

    @functools.cached_property
    def _converters(self) -> list[WeightConverter]:
        return [rule for rule in self._rules if isinstance(rule, WeightConverter)]

    @functools.cached_property
    def _converter_of(self) -> dict[str, WeightConverter]:
        return {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    @functools.cached_property
    def _renamings(self) -> list[WeightRenaming]:
        return [rule for rule in self._rules if isinstance(rule, WeightRenaming)]

    @property
    def params(self) -> Iterable[str]:
        """Every parameter and saved buffer of the model, tied ones under each of their names."""
        return self._state.keys()

    def shape(self, param: str) -> tuple[int, ...]:
        """The shape that the model gives `param`."""
        return tuple(self._state[param].shape)

    def source(self, param: str) -> str | None:
        """The name under which the checkpoint has the values of `param`: its own, or one it is tied to."""
        return next((name for name in (param, *self.twins.get(param, ())) if name in self.of_param), None)

    def to_params(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's parameters of `group`, from its tensors in the checkpoint."""
        if group.converter is None:
            return {group.params[0]: tensors[group.keys[0]]}
        converter: Any = copy.deepcopy(group.converter)
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            converter.add_tensor(group.params[0], key, pattern, tensors[key])
        with _refusing(group.params[0]):
            made = converter.convert(group.params[0], model=self._layout, config=self._layout.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def to_keys(self, group: Group, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of `group` as the checkpoint has them, from the model's parameters."""
        if group.converter is None:
            return {group.keys[0]: values[group.params[0]]}
        with _refusing(group.params[0]):
            made = revert_weight_conversion(self._layout, dict(values))
        prefix = f"{self._layout.base_model_prefix}."
        for rename in (str, lambda key: key.removeprefix(prefix), lambda key: prefix + key):
            renamed = {rename(key): value for key, value in made.items()}
            if renamed.keys() == set(group.keys):
                return renamed
        raise MergeError(f"{group.params[0]} cannot be written back under the names that the base has for it.")

    def new_key(self, param: str) -> str:
        """The name in a checkpoint for `param`, which the base's checkpoint lacks."""
        return str(next(iter(revert_weight_conversion(self._layout, {param: self._state[param]}))))

    def _place(self, key: str) -> None:
        prefix = self._layout.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            name, pattern = rename_source_key(key, [], [], prefix, self._state)
        converter = self._converter_of.get(pattern or "")
        params = _targets(name, converter, self._state)
        if not params:
            return  # not a part of this model: rotary buffers of old checkpoints, heads of other tasks
        group = self.of_param.get(params[0])
        if group is None:
            group = Group(params, converter=converter)
            self.of_param.update(dict.fromkeys(params, group))
        elif converter is None:
            raise MergeError(f"The base has two tensors for {name}: {group.keys[0]} and {key}.")
        group.keys.append(key)
        group.patterns.append(pattern or "")
        self.of_key[key] = group


def _targets(name: str, converter: WeightConverter | None, state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    if converter is None:
        return (name,) if name in state else ()
    patterns = converter.target_patterns
    return tuple(made for target in patterns if (made := name.replace(patterns[0], target)) in state)


def _twins(layout: tf.PreTrainedModel) -> dict[str, tuple[str, ...]]:
    by_identity: dict[int, list[str]] = {}
    for name, parameter in layout.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {name: tuple(n for n in names if n != name) for names in by_identity.values() for name in names}


class _refusing:
    """Turns whatever a conversion raises into a MergeError that names the parameter."""

    def __init__(self, param: str) -> None:
        self._param = param

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if isinstance(error, Exception):
            reason = re.sub(r"\s+", " ", str(error))
            raise MergeError(f"The base's tensors for {self._param} cannot be converted ({reason}).") from error
