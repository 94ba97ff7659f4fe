"""Which tensors of a merged model come from where, and each one's making."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from transformers.core_model_loading import dot_natural_key
from transformers.pytorch_utils import Conv1D

from client.merge.adapter import Adapted, AdapterFolder
from client.merge.base import BaseCheckpoint, MergeError, stored_dtype
from client.merge.names import Group, Names
from client.merge.write import ShardWriter, Spec

_TASKS: dict[str, Any] = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
}


@dataclass
class Unit:
    """What is read and written together: one tensor that is only copied, or modules whose weights hang together."""

    copied: str | None = None
    groups: list[Group] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    """Parameters that the base's checkpoint has no tensor for: new heads, and what is tied no longer."""
    specs: list[Spec] = field(default_factory=list)

    @property
    def params(self) -> list[str]:
        """Every parameter of the model that the unit writes."""
        return [param for group in self.groups for param in group.params] + self.fresh


class MergePlan:
    """The units of a merge, in the order of the base's tensors. Raises MergeError where base and adapter do not fit.

    `dtype`: the type of the merged weights; None: as they are stored.
    """

    def __init__(self, adapter: AdapterFolder, base: BaseCheckpoint, dtype: torch.dtype | None) -> None:
        self._base, self._dtype = base, dtype
        self._layout = build_model(base, adapter)
        self._names = Names(self._layout, base.entries)
        self._adapted = Adapted(build_model(base, adapter), adapter, self._compute_dtype(self._layout.dtype))
        self._given = self._adapted.given
        self._site_of = {
            param: site for site in self._adapted.sites for param in self._names.params if param.startswith(f"{site}.")
        }
        self._exempt = list(self._layout._get_dtype_plan(dtype)) if dtype is not None else []
        self._conv1d = {f"{name}.weight" for name, module in self._layout.named_modules() if isinstance(module, Conv1D)}
        self.untied = False
        self._check_base()
        self.units = list(self._make_units())

    @property
    def modules(self) -> int:
        """Number of adapted modules."""
        return sum(len(unit.sites) for unit in self.units)

    def write(self, unit: Unit, writer: ShardWriter) -> None:
        """Make the tensors of `unit` and write them; its modules' part of the adapter is dropped."""
        if unit.copied is not None:
            writer.write(unit.copied, self._read(unit.copied))
            return
        values = self._base_values(unit)
        inputs = [(site, self._inputs(site, values)) for site in unit.sites]
        values |= {param: values[source] for param in unit.fresh if (source := self._names.source(param)) in values}
        values |= {param: self._given[param] for param in unit.params if param in self._given}
        for site, tensors in inputs:
            merged = self._adapted.merge(site, tensors)
            values |= {f"{site}.{leaf}": tensor for leaf, tensor in merged.items()}
        for group in unit.groups:
            for key, tensor in self._names.to_keys(group, {param: values[param] for param in group.params}).items():
                writer.write(key, tensor)
        for param in unit.fresh:
            writer.write(self._names.new_key(param), values[param])

    def config(self) -> dict[str, Any]:
        """The merged model's config.json."""
        config = {key: value for key, value in self._base.config.items() if key != "quantization_config"}
        if self._dtype is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(self._dtype).removeprefix("torch.")
        if self.untied:
            config["tie_word_embeddings"] = False
            if "tie_word_embeddings" in config.get("text_config", {}):
                config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
        if self._is_other_class():
            config["architectures"] = [type(self._layout).__name__]
            labels = self._layout.config.to_dict()
            config |= {key: labels[key] for key in ("id2label", "label2id") if key in labels}
        return config

    def _is_other_class(self) -> bool:
        # of the whole base only its language model may have been adapted
        is_part = self._layout.config.model_type != self._base.config.get("model_type")
        return not is_part and type(self._layout).__name__ not in (self._base.config.get("architectures") or [])

    def _check_base(self) -> None:
        for param, _ in self._layout.named_parameters(remove_duplicate=False):
            whole = param in self._site_of and self._adapted.replaces(self._site_of[param])
            if self._names.source(param) is None and param not in self._given and not whole:
                raise MergeError(
                    f"The base {self._base.folder} has no tensor for {param}: it is incomplete, or no "
                    f"{type(self._layout).__name__}, or the adapter lacks the head it was trained with."
                )
        for key, group in self._names.of_key.items():
            wanted = self._names.shape(group.params[0])
            if group.converter is None and self._shape(key) != wanted:
                raise MergeError(
                    f"Tensor {key} of the base is {list(self._shape(key))} and its config.json asks for {list(wanted)}."
                )

    def _make_units(self) -> Iterator[Unit]:
        touched = [*self._site_of, *self._given]
        unit_of: dict[int, Unit] = {}
        headless = []
        seen: set[str] = set()
        for param in touched:
            if param not in seen:
                unit = self._unit_around(param, seen)
                unit_of |= {id(group): unit for group in unit.groups}
                headless += [] if unit.groups else [unit]
        done: set[int] = set()
        for key in sorted(self._base.entries, key=dot_natural_key):
            group = self._names.of_key.get(key)
            made_by = unit_of.get(id(group)) if group is not None else None
            if made_by is None and (group is not None or not self._is_other_class()):
                dtype = self._out_dtype(key, self._base.entries[key].dtype)
                yield Unit(copied=key, specs=[Spec(key, self._shape(key), dtype)])
            elif made_by is not None and id(made_by) not in done:
                done.add(id(made_by))
                yield made_by
        yield from headless

    def _unit_around(self, start: str, seen: set[str]) -> Unit:
        """Everything that must be made together with the parameter `start`; added to `seen`."""
        unit, todo, found = Unit(), [start], []
        while todo:
            param = todo.pop()
            if param in seen:
                continue
            seen.add(param)
            found.append(param)
            todo += self._names.twins.get(param, ())
            if (group := self._names.of_param.get(param)) is not None and group not in unit.groups:
                unit.groups.append(group)
                todo += group.params
            if (site := self._site_of.get(param)) is not None and site not in unit.sites:
                unit.sites.append(site)
                todo += [other for other, where in self._site_of.items() if where == site]
        unit.fresh = [p for p in sorted(found) if p not in self._names.of_param and not self._stays_tied(p)]
        needed = {self._site_of.get(param) for param in unit.params}
        unit.sites = [site for site in unit.sites if site in needed]
        self.untied |= any(self._tied_to(p) is not None and not self._stays_tied(p) for p in found)
        unit.specs = [self._key_spec(key) for group in unit.groups for key in group.keys]
        unit.specs += [self._fresh_spec(param) for param in unit.fresh]
        return unit

    def _tied_to(self, param: str) -> str | None:
        return next((twin for twin in self._names.twins.get(param, ()) if twin in self._names.of_param), None)

    def _stays_tied(self, param: str) -> bool:
        other = self._tied_to(param)
        if other is None:
            return False
        sites = [self._site_of[name] for name in (param, other) if name in self._site_of]
        return not sites or (len(sites) == 2 and self._adapted.shares_tie(*sites))

    def _key_spec(self, key: str) -> Spec:
        param = self._names.of_key[key].params[0]
        return Spec(key, self._shape(key), self._out_dtype(param, self._base.entries[key].dtype))

    def _fresh_spec(self, param: str) -> Spec:
        source = self._names.source(param)
        like = self._names.of_param[source].keys[0] if source is not None else next(iter(self._base.entries))
        dtype = self._out_dtype(param, self._base.entries[like].dtype)
        return Spec(self._names.new_key(param), self._names.shape(param), dtype)

    def _out_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        if self._dtype is None or not stored.is_floating_point:
            return stored
        return stored if any(re.search(pattern, name) for pattern in self._exempt) else self._dtype

    def _is_turned(self, key: str) -> bool:
        """Whether the tensor is stored the other way round: bitsandbytes does so with GPT-2's Conv1D."""
        group = self._names.of_key.get(key)
        return bool(self._base.entries[key].state) and group is not None and group.params[0] in self._conv1d

    def _shape(self, key: str) -> tuple[int, ...]:
        shape = self._base.entries[key].shape
        return shape[::-1] if self._is_turned(key) else shape

    def _read(self, key: str) -> torch.Tensor:
        tensor = self._base.read(key)
        return tensor.t().contiguous() if self._is_turned(key) else tensor

    def _base_values(self, unit: Unit) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = {}
        for group in unit.groups:
            tensors = {key: self._widen(self._read(key)) for key in group.keys}
            values |= self._names.to_params(group, tensors)
        for param, tensor in values.items():
            if tuple(tensor.shape) != self._names.shape(param):
                wanted = list(self._names.shape(param))
                raise MergeError(f"The base's {param} is {list(tensor.shape)} and its config.json asks for {wanted}.")
        return values

    def _widen(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(self._compute_dtype(tensor.dtype))

    def _compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored if self._dtype is None else torch.promote_types(stored, self._dtype)

    def _inputs(self, site: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base's part of what the module `site` is merged from; tied modules get a copy each."""
        tensors: dict[str, torch.Tensor] = {}
        if self._adapted.replaces(site):
            return tensors
        for param, where in self._site_of.items():
            source = self._names.source(param) if where == site and param not in self._given else None
            if source is not None:
                value = values[source]
                tensors[param.removeprefix(f"{site}.")] = value.clone() if param in self._names.twins else value
        return tensors


def build_model(base: BaseCheckpoint, adapter: AdapterFolder) -> tf.PreTrainedModel:
    """The class of model that the adapter was trained on, with the base's config, on the meta device."""
    try:
        config: Any = tf.AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        task = _TASKS.get(adapter.config.task_type or "")
        if adapter.num_labels is not None and adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
            config.num_labels = adapter.num_labels
        options = {"attn_implementation": "eager", "dtype": stored_dtype(base.config) or torch.float32}
        with torch.device("meta"):
            if task is not None and type(config) in task._model_mapping:
                model: tf.PreTrainedModel = task.from_config(config, **options)
            else:
                model = _named_class(base)._from_config(config, **options)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise MergeError(f"Transformers cannot build the model that {base.folder} describes ({reason}).") from error
    model.eval()
    return model


def _named_class(base: BaseCheckpoint) -> Any:
    names = base.config.get("architectures") or ["(none)"]
    found = getattr(tf, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, tf.PreTrainedModel)):
        raise MergeError(f"Transformers has no model class {names[0]}, which {base.folder} names as its architecture.")
    return found
