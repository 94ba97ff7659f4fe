"""PEFT's methods as sections of the run's description: options checked before anything is loaded, adapters attached.

The options of a method are the fields of its PEFT config, by the same names and types, so that a new PEFT release
brings its new options by itself. Left out are those that PEFT or this run sets, and those that take a config object.
"""

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import peft
from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from client.tune.errors import ConfigError

PROMPT_METHODS = frozenset({"prompt", "ptuning", "prefix"})
_DERIVED = {"token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"}
_MEGATRON = {"megatron_config", "megatron_core"}
_SET_BY_PEFT = {field.name for field in dataclasses.fields(peft.PeftConfig)}
_DEFAULT_VIRTUAL_TOKENS = 20
_FAR_INITS = {"eva", "corda", "lora_ga", "loftq", "mica"}
"""They begin with the blocks' activations, gradients or whole weights, none of which come to this machine."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One choice of `adapter.method`: the PEFT config behind it, and the fields the choice itself fixes."""

    config: type[peft.PeftConfig]
    preset: dict[str, Any] = dataclasses.field(default_factory=dict)
    hidden: frozenset[str] = frozenset()


METHODS: dict[str, Method] = {
    "lora": Method(peft.LoraConfig),
    "rslora": Method(peft.LoraConfig, {"use_rslora": True}),
    "dora": Method(peft.LoraConfig, {"use_dora": True}),
    # AdaLoRA ignores r (it has init_r and target_r) and fills rank_pattern itself.
    "adalora": Method(peft.AdaLoraConfig, hidden=frozenset({"r", "rank_pattern"})),
    "ia3": Method(peft.IA3Config),
    "vera": Method(peft.VeraConfig),
    "loha": Method(peft.LoHaConfig),
    "lokr": Method(peft.LoKrConfig),
    "oft": Method(peft.OFTConfig),
    "prompt": Method(peft.PromptTuningConfig),
    "ptuning": Method(peft.PromptEncoderConfig),
    "prefix": Method(peft.PrefixTuningConfig),
}


class AdapterOptions(BaseModel):
    """The adapter section of a run: a method and the options the user set for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: str

    def options(self) -> dict[str, Any]:
        """The PEFT config's fields as the user gave them, with those the method fixes."""
        given = self.model_dump(exclude_unset=True, exclude={"method"})
        return {**given, **METHODS[self.method].preset}

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that the adapter takes for itself (prompt methods), else 0."""
        return int(getattr(self, "num_virtual_tokens", 0))


def _is_plain(hint: Any) -> bool:
    """Whether a type is made of what YAML can say: a field that takes another config object is not."""
    arguments = () if typing.get_origin(hint) is Literal else typing.get_args(hint)
    return not dataclasses.is_dataclass(hint) and all(_is_plain(argument) for argument in arguments)


def _widen(name: str, hint: Any) -> Any:
    """PEFT's own hint, except where a listed string stands for a pattern ("pissa_niter_[number of iters]")."""
    return bool | str if name == "init_lora_weights" else hint


def _fields(method: Method) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(method.config)
    left_out = _SET_BY_PEFT | _MEGATRON | _DERIVED | method.hidden | method.preset.keys()
    for field in dataclasses.fields(method.config):
        if field.name in left_out or not _is_plain(hints[field.name]):
            continue
        hint = _widen(field.name, hints[field.name])
        if field.name == "num_virtual_tokens":
            yield field.name, (Annotated[int, Field(gt=0)], _DEFAULT_VIRTUAL_TOKENS)
        elif field.default_factory is not dataclasses.MISSING:
            yield field.name, (hint, Field(default_factory=field.default_factory))
        else:
            # PEFT writes "int" where it means "int, or None until set".
            yield field.name, (hint if field.default is not None else hint | None, field.default)


def _options_model(name: str, method: Method) -> type[AdapterOptions]:
    fields: dict[str, Any] = {"method": (Literal[name], ...), **dict(_fields(method))}
    return create_model(f"{name.capitalize()}Options", __base__=AdapterOptions, **fields)


OPTIONS: dict[str, type[AdapterOptions]] = {name: _options_model(name, method) for name, method in METHODS.items()}

if TYPE_CHECKING:
    AdapterChoice = AdapterOptions
else:
    AdapterChoice = Annotated[Union[tuple(OPTIONS.values())], Field(discriminator="method")]  # noqa: UP007


def peft_config(adapter: AdapterOptions, model_name: str, steps: int, revision: str | None = None) -> peft.PeftConfig:
    """The PEFT config of a run of `steps` optimizer steps on `revision` of `model_name`.

    Raises:
        ConfigError: PEFT refuses the options.
    """
    options = adapter.options()
    if options.get("init_lora_weights") in _FAR_INITS:
        raise ConfigError(
            f"adapter.init_lora_weights: {options['init_lora_weights']} needs more of the blocks than peers give; "
            "expected true, gaussian, orthogonal, pissa, pissa_niter_N or olora"
        )
    if adapter.method == "adalora":
        options.setdefault("total_step", steps)
    if adapter.method in PROMPT_METHODS:
        options.setdefault("num_virtual_tokens", adapter.virtual_tokens)
    is_text = str(options.get("prompt_tuning_init", "")).upper().endswith("TEXT")
    if is_text and "tokenizer_name_or_path" not in options:
        options["tokenizer_name_or_path"] = model_name
        options["tokenizer_kwargs"] = {"revision": revision, **(options.get("tokenizer_kwargs") or {})}
    try:
        return METHODS[adapter.method].config(task_type="CAUSAL_LM", revision=revision, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: PEFT refuses these options for {adapter.method}: {_line(error)}") from error


def attach(model: PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    """`model` with a fresh adapter, the adapter's parameters trainable and nothing else.

    Raises:
        ConfigError: a target module does not exist, or PEFT can't put this adapter on this model.
    """
    for field in ("target_modules", "modules_to_save", "feedforward_modules"):
        _check_modules(model, field, getattr(config, field, None))
    try:
        return peft.get_peft_model(model, config)
    except IndexError as error:
        raise ConfigError(f"adapter: it trains tokens that the model has no embeddings for: {_line(error)}") from error
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:  # the last two: a size past reason
        raise ConfigError(f"adapter: PEFT can't attach this adapter: {_line(error)}") from error


def _check_modules(model: nn.Module, field: str, wanted: object) -> None:
    """PEFT says nothing when only some of the names exist, and would train less than the user asked for."""
    if wanted is None or wanted == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        missing = [] if any(_pattern(field, wanted).fullmatch(name) for name in names) else [wanted]
    elif isinstance(wanted, list | set | tuple):
        missing = [want for want in sorted(wanted) if not any(n == want or n.endswith(f".{want}") for n in names)]
    else:
        missing = []
    if missing:
        known = ", ".join(sorted(_targets(model)))
        raise ConfigError(
            f"adapter.{field}: {missing[0]!r} matches no module of {type(model).__name__}; it has {known}"
        )


def _pattern(field: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"adapter.{field}: {text!r} is no regular expression: {error}") from error


def _targets(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kinds)}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
