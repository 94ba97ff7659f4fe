"""An adapter injected by PEFT into a model without weights, and merged by PEFT one module at a time."""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import peft
import torch
import transformers as tf
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from client.merge.base import MergeError, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = "default"
_RESIDUAL_INITS = ("pissa", "olora")
"""LoRA inits that take a part out of the base weight and can do so again, exactly, from that weight alone."""
_LOST_RESIDUAL_INITS = ("pissa_niter_", "corda", "loftq", "lora_ga")
_METHODS = (
    "LORA", "ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
    "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""Each compared with `merge_and_unload`. Not here: what PEFT cannot merge, and what starts from all base weights."""
_SAVED_BASE = ".base_layer.weight"
"""How PEFT saves the base weight of an adapted embedding, in case the vocabulary was resized."""
_TABLES = r"embed|wte|lm_head"
_HEADS = ("score", "classifier", "qa_outputs")
_RESIZED = "if only the vocabulary was resized, save the resized base and merge into that"


class Stub(nn.Parameter):
    """A parameter with shape and dtype on the CPU, and no memory: what PEFT looks at while it injects an adapter.

    Its values are NaN, so that a method that starts from them is noticed.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Self:
        made: Self = torch.Tensor._make_subclass(cls, data, requires_grad)
        return made

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype) -> Self:
        """A stub of this shape and dtype."""
        return cls(torch.full((), torch.nan, dtype=dtype).expand(shape))

    def retype(self, dtype: torch.dtype) -> None:
        """Be a stub of another dtype from now on."""
        self.data = Stub.of(self.shape, dtype).data

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # `modules_to_save` starts from a copy of the module; the adapter file has its values.
        return nn.Parameter(torch.empty(self.shape, dtype=self.dtype, device="meta"), requires_grad=False)


def check_is_adapter(folder: Path) -> None:
    """Raises MergeError where `folder` is the output of `peer tune`, which has the adapter in a folder of its own."""
    inner = folder / "adapter"
    if not (folder / CONFIG_FILE).exists() and (inner / CONFIG_FILE).exists():
        raise MergeError(f"{folder} is not a PEFT adapter folder: it has no {CONFIG_FILE}; did you mean {inner}?")


class AdapterFolder:
    """The adapter in `folder`: its config checked, its tensors not yet read. Raises MergeError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_is_adapter(folder)
        read_json(folder / CONFIG_FILE, "a PEFT adapter folder")
        try:
            self.config: Any = peft.PeftConfig.from_pretrained(str(folder))
        except (KeyError, TypeError, ValueError) as error:
            raise MergeError(f"{folder / CONFIG_FILE} is not a config that this PEFT knows ({error}).") from error
        self.method = str(getattr(self.config.peft_type, "value", self.config.peft_type))
        self._check_method()
        if not (folder / WEIGHTS_FILE).is_file():
            raise MergeError(
                f"{folder} has no {WEIGHTS_FILE}: save the adapter with `save_pretrained`, which writes it."
            )
        self.shapes, self._dtypes = self._scan()

    @property
    def dtype(self) -> torch.dtype:
        """The type its tensors are stored in, float32 where they differ: loading then casts as little as it can."""
        return next(iter(self._dtypes)) if len(self._dtypes) == 1 else torch.float32

    @property
    def base_name(self) -> str:
        """The model that it was trained on, by its config; may be empty."""
        return self.config.base_model_name_or_path or ""

    @property
    def num_labels(self) -> int | None:
        """Rows of the classification head that it holds, if it holds one."""
        heads = (key for key in self.shapes if key.endswith(tuple(f".{head}.weight" for head in _HEADS)))
        return next((self.shapes[key][0] for key in heads), None)

    def _check_method(self) -> None:
        if self.config.is_prompt_learning:
            raise MergeError(
                f"{self.folder} is a {self.method} adapter: its trained prompt is no part of any weight and cannot be "
                "merged; keep the base and load the adapter at inference (`PeftModel.from_pretrained`)."
            )
        if self.method not in _METHODS:
            raise MergeError(
                f"{self.folder} is a {self.method} adapter, which cannot be merged one module at a time: load it with "
                "`PeftModel.from_pretrained`, and merge it with `merge_and_unload` where PEFT can."
            )
        if getattr(self.config, "layer_replication", None):
            raise MergeError(f"{self.folder} repeats layers of its base, so that no weight of the base can hold it.")
        init = getattr(self.config, "init_lora_weights", True)
        if isinstance(init, str) and init.startswith(_LOST_RESIDUAL_INITS):
            raise MergeError(
                f"{self.folder} was trained on base weights that its {init} init had changed and that cannot be had "
                "again: save it with `save_pretrained(path_initial_model_for_weight_conversion=...)` and merge that."
            )

    def _scan(self) -> tuple[dict[str, tuple[int, ...]], set[torch.dtype]]:
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: set[torch.dtype] = set()
        try:
            with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_tensor(key)
                    shapes[key] = tuple(tensor.shape)
                    if tensor.is_floating_point() and not key.endswith(_SAVED_BASE):
                        dtypes.add(tensor.dtype)
        except (SafetensorError, OSError) as error:
            raise MergeError(f"{self.folder / WEIGHTS_FILE} is not a sound safetensors file ({error}).") from error
        return shapes, dtypes


class Adapted:
    """`skeleton` (on the meta device; taken over) with the adapter injected, its tensors mapped from their file.

    `dtype`: the type of the base's weights. Raises MergeError where the adapter does not belong to this model.
    """

    def __init__(self, skeleton: tf.PreTrainedModel, adapter: AdapterFolder, dtype: torch.dtype) -> None:
        self._adapter, self._kind = adapter, type(skeleton).__name__
        self._init = getattr(adapter.config, "init_lora_weights", True)
        self._origin = dict(skeleton.named_modules())
        stubs = _fill_with_stubs(skeleton, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ties, merging, projections made from a seed: all handled
            self.peft = self._inject(skeleton)
            for stub in stubs:
                stub.retype(adapter.dtype)  # PEFT casts what it loads to its base's dtype; this one keeps all bits
            self.given = self._load()
        """Base parameters whose values the adapter file holds itself: trained biases, embeddings."""
        self.sites: dict[str, nn.Module] = dict(_find_sites(self._tree, ""))
        self._check_complete()

    @property
    def _tree(self) -> nn.Module:
        tree: nn.Module = self.peft.base_model.model
        return tree

    def replaces(self, path: str) -> bool:
        """Whether the adapter holds the module `path` whole, so that the base's values do not matter."""
        return isinstance(self.sites[path], ModulesToSaveWrapper)

    def shares_tie(self, path: str, other: str) -> bool:
        """Whether two adapted modules with one weight still have one weight after merging."""
        layers = [getattr(self.sites[name], "token_adapter", self.sites[name]) for name in (path, other)]
        if any(getattr(layer, "tied_adapter", None) is not None for layer in layers):
            return True
        # `ensure_weight_tying` says so too, but PEFT's casts can part the two in training.
        one, two = (_factors(layer) for layer in layers)
        return bool(one) and len(one) == len(two) and all(map(torch.equal, one, two))

    def merge(self, path: str, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The merged parameters of the module `path`, by their names in it, from its `base` ones, and forget it.

        `base` must be private copies. The arithmetic is PEFT's, adapters in float32 as it keeps them in training.
        """
        site, origin = self.sites.pop(path), self._origin[path]
        for leaf, tensor in base.items():
            parent, _, name = leaf.rpartition(".")
            setattr(origin.get_submodule(parent), name, nn.Parameter(tensor, requires_grad=False))
        cast_adapter_dtype(site, _NAME)
        try:
            self._take_out_residual(site)
            merged = _unload(site)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise MergeError(
                f"PEFT cannot merge this {self._adapter.method} adapter at {path}: {_line(error)}"
            ) from error
        if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in merged.modules()):
            raise MergeError(f"{path} has adapters inside adapters, which cannot be merged one module at a time.")
        tensors: dict[str, torch.Tensor] = dict(merged.state_dict())
        self._forget(path)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise MergeError(
                f"Merging at {path} gives values that are not numbers: the adapter is broken, or its kind of "
                f"{self._adapter.method} starts from the whole model (which `PeftModel.merge_and_unload` has)."
            )
        return tensors

    def _forget(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._tree.get_submodule(parent), name, nn.Identity())
        for module in self._origin.pop(path).modules():
            module._parameters.clear()

    def _inject(self, skeleton: tf.PreTrainedModel) -> Any:
        config = self._adapter.config
        config.inference_mode = True
        if isinstance(self._init, str) and self._init != "mica":  # mica is also a layer type
            config.init_lora_weights = True  # every tensor comes from the file
        kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
        try:
            return kind(skeleton, config, _NAME, low_cpu_mem_usage=True)
        except IndexError as error:
            raise MergeError(
                f"The adapter trains tokens that this base has no embeddings for ({_line(error)}); {_RESIZED}."
            ) from error
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise MergeError(f"The adapter does not fit the base ({self._kind}): {_line(error)}") from error

    def _load(self) -> dict[str, torch.Tensor]:
        renames = getattr(self.peft.get_base_model(), "_checkpoint_conversion_mapping", {})
        tensors = load_peft_weights(str(self._adapter.folder), device="cpu", key_mapping=renames)
        saved = {key: tensors.pop(key) for key in list(tensors) if key.endswith(_SAVED_BASE)}
        try:
            result = set_peft_model_state_dict(self.peft, tensors, _NAME, low_cpu_mem_usage=True)
        except RuntimeError as error:
            raise MergeError(self._mismatch(error)) from error
        except (KeyError, ValueError) as error:
            raise MergeError(f"The adapter file lacks or garbles {_line(error)}.") from error
        if result.unexpected_keys:
            raise MergeError(self._stranger(result.unexpected_keys))
        return self._given(saved)

    def _given(self, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base parameters among what was loaded, and those in `saved`."""
        given = {}
        strangers = set(saved)
        for path, module in self._origin.items():
            for leaf, parameter in module.named_parameters(recurse=False):
                key = f"base_model.model.{path}.base_layer.{leaf}"
                if key in saved:
                    if saved[key].shape != parameter.shape:
                        raise MergeError(self._resized(_plain(key), list(saved[key].shape), list(parameter.shape)))
                    setattr(module, leaf, nn.Parameter(saved[key], requires_grad=False))
                    given[f"{path}.{leaf}"] = saved[key]
                    strangers.discard(key)
                elif not isinstance(parameter, Stub):
                    given[f"{path}.{leaf}"] = parameter.detach()
        if strangers:
            raise MergeError(self._stranger(sorted(strangers)))
        return given

    def _stranger(self, keys: list[str]) -> str:
        return (
            f"{len(keys)} tensors of the adapter have no place in the base ({self._kind}), {_plain(keys[0])} among "
            "them: it was trained on another model."
        )

    def _mismatch(self, error: Exception) -> str:
        mismatch = find_mismatch(error)
        if mismatch is None:
            return f"The adapter's tensors do not fit the base ({self._kind}): {_line(error)}"
        return self._resized(*mismatch)

    def _resized(self, name: str, here: object, there: object) -> str:
        message = f"The adapter was trained on another model: its tensor {name} is {here}, and this base needs {there}"
        if not re.search(_TABLES, name):
            return f"{message}."
        return f"{message}; {_RESIZED}."

    def _check_complete(self) -> None:
        base = {id(buffer) for module in self._origin.values() for buffer in module.buffers(recurse=False)}
        for path, site in self.sites.items():
            tensors = site.state_dict(keep_vars=True).items()
            lost = next((name for name, tensor in tensors if tensor.is_meta and id(tensor) not in base), None)
            if lost is not None:
                raise MergeError(f"The adapter file has no tensor {_plain(lost)} for {path}: save the adapter anew.")

    def _take_out_residual(self, site: nn.Module) -> None:
        if self._init not in _RESIDUAL_INITS:
            return
        for layer in site.modules():
            if isinstance(layer, LoraLayer) and _NAME in layer.lora_A:
                factors = (layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
                trained = [factor.data for factor in factors]
                layer.pissa_init(_NAME, self._init) if self._init == "pissa" else layer.olora_init(_NAME)
                for factor, data in zip(factors, trained, strict=True):
                    factor.data = data


def find_mismatch(error: Exception) -> tuple[str, str, str] | None:
    """The first tensor that torch could not load for its size: its name, its own shape, and the model's."""
    pattern = r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)"
    found = re.search(pattern, str(error))
    return None if found is None else (_plain(found[1]), found[2], found[3])


def _fill_with_stubs(model: nn.Module, dtype: torch.dtype) -> list[Stub]:
    stubs: dict[int, Stub] = {}  # tied parameters stay one object
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stub = stubs.setdefault(id(parameter), Stub.of(parameter.shape, dtype))
                module._parameters[name] = stub
    return list(stubs.values())


def _find_sites(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield prefix + name, child
        else:
            yield from _find_sites(child, f"{prefix}{name}.")


def _unload(site: Any) -> nn.Module:
    """What PEFT's `merge_and_unload` does with one module."""
    if hasattr(site, "unload_and_optionally_merge_module"):
        unloaded: nn.Module = site.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return unloaded
    site.merge(safe_merge=False, adapter_names=None)
    base: nn.Module = site.get_base_layer()
    return base


def _factors(site: Any) -> list[torch.Tensor]:
    """What the adapter makes of an embedding table, comparable between the embedding and a head; [] if unknown."""
    if isinstance(site, ModulesToSaveWrapper):
        return [site.modules_to_save[_NAME].weight]
    if not isinstance(site, LoraLayer) or site.lora_magnitude_vector:
        return []
    scaling = torch.tensor(site.scaling[_NAME])
    if _NAME in site.lora_embedding_A:
        return [scaling, site.lora_embedding_A[_NAME], site.lora_embedding_B[_NAME]]
    return [scaling, site.lora_B[_NAME].weight.t(), site.lora_A[_NAME].weight.t()]


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(f".{_NAME}", "")


def _line(error: object) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
