"""One run, as its user describes it: pydantic models, read from YAML and from `a.b=c` overrides."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from client.swarm.config import NetworkOptions
from client.tune.data.formats import COLUMNS, FormatName
from client.tune.description.peft_methods import METHODS, OPTIONS, PROMPT_METHODS, AdapterChoice
from client.tune.errors import ConfigError
from protocol.machine.paths import LocalPath, ModelName, local_path

DEFAULT_EPOCHS = 3.0
LONGEST_DEFAULT = 2048
_MOST = 2**31 - 1  # of anything that is counted: what Torch and Transformers do with more differs from field to field

Count = Annotated[int, Field(gt=0, le=_MOST)]


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


class Section(BaseModel):
    """A part of the description: unknown keys are errors, values do not change once read, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the records are and how they become tokens."""

    path: Annotated[list[LocalPath], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description="files, folders, and patterns such as data/*.jsonl"
    )
    format: Literal["auto"] | FormatName = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="our column name: the name in the file")
    system: str | None = Field(default=None, description="system message of records that bring none")
    train_on: Literal["answers", "all"] = "answers"
    # The validator below is the one to refuse inf: pydantic would add in how many ways it is no path either.
    validation: Annotated[float, Field(allow_inf_nan=True)] | Path = Field(
        default=0.0, description="a share of the records, or a path, as in data.path"
    )
    max_length: int | None = Field(
        default=None, ge=8, le=_MOST, description="tokens; none: the model's context, at most 2048"
    )
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    packing: bool = False

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_path(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return float(value)  # YAML takes 1e-1 for text
        except ValueError:
            return local_path(value)

    @field_validator("validation")
    @classmethod
    def _share_below_one(cls, value: float | Path) -> float | Path:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("a share must be at least 0 and below 1")
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(value.keys() - set(COLUMNS))
        if unknown:
            raise ValueError(f"unknown column {unknown[0]!r}, known are {', '.join(COLUMNS)}")
        return value


class TrainerConfig(Section):
    """How it learns; each is the `TrainingArguments` field of the same meaning."""

    steps: Count | None = Field(default=None, description="optimizer steps; instead of epochs")
    epochs: float | None = Field(
        default=None, gt=0, le=_MOST, description="passes over the data; 3 if neither is given"
    )
    batch_size: Count = Field(default=8, description="rows per micro-batch")
    gradient_accumulation: Count = Field(default=1, description="micro-batches per optimizer step")
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt"] = "cosine"
    warmup: float = Field(
        default=0.03, ge=0, le=_MOST, description="a share of the steps if below 1, else a number of steps"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: do not clip")
    seed: int = Field(default=42, ge=0, lt=2**32)
    log_every: Count = 1
    eval_every: Count | None = Field(default=None, description="none: before the first step and after the last")
    save_every: Count = 100
    keep_checkpoints: Count = 2
    tensorboard: bool = False

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "TrainerConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class SamplesConfig(Section):
    """Texts that the model continues before and after, without chance."""

    prompts: list[str] = Field(default_factory=list)
    count: int = Field(
        default=3, ge=0, le=_MOST, description="how many to take from the data when no prompts are given"
    )
    max_new_tokens: Count = 64


class TuneConfig(Section):
    """One fine-tuning run."""

    model: ModelName = Field(min_length=1, description="folder, a name of the swarm's, or hub name")
    revision: str | None = None
    initial_peers: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    swarm: str | None = Field(default=None, description="a private swarm that this machine has joined")
    discovery: bool = Field(default=True, description="look for the swarm's members on this machine's networks")
    network: NetworkOptions = Field(default_factory=NetworkOptions)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", description="for what this machine holds: auto, cpu, cuda:0, ...")
    data: DataConfig
    adapter: AdapterChoice = Field(default_factory=lambda: OPTIONS["lora"](method="lora"))
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    output: LocalPath

    @model_validator(mode="after")
    def _packing_needs_positions(self) -> "TuneConfig":
        if self.data.packing and self.adapter.method in PROMPT_METHODS:
            raise ValueError(
                f"data.packing does not go with adapter.method {self.adapter.method}: its virtual tokens stand before a"
                " row, not before each record in it"
            )
        return self

    def max_length(self, context: int | None) -> int:
        """Tokens a record may have on a model that reads `context` of them (none: no limit known).

        Raises:
            ConfigError: data.max_length and the adapter's virtual tokens do not fit in the context.
        """
        room = None if context is None else context - self.adapter.virtual_tokens
        wanted = self.data.max_length or min(room or LONGEST_DEFAULT, LONGEST_DEFAULT)
        if room is not None and wanted > room:
            raise ConfigError(f"data.max_length: {wanted} tokens do not fit, {self.model} has room for {room}")
        return wanted


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word, stumbles over a date or number that there can't be, and
    leaves the two halves of a character apart that JSON's escapes write; here the halves are joined, and the rest are
    errors like any other of its own.
    """

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = str(super().construct_scalar(node))
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise yaml.MarkedYAMLError(
                problem=f"{text!r} holds half a character", problem_mark=node.start_mark
            ) from error

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            raise yaml.MarkedYAMLError(problem=f"{node.value!r} is no value", problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> TuneConfig:
    """The run described by a YAML file (or by nothing), changed by overrides such as `trainer.steps=100`.

    Raises:
        ConfigError: the file can't be read, is no YAML, or describes no run; an override is not of the form a.b=c.
    """
    values = {} if path is None else _read(path)
    flags: dict[str, Any] = {}
    for override in overrides:
        _override(flags, override)
    _merge(values, flags)
    try:
        return TuneConfig.model_validate(values)
    except ValidationError as error:
        where = "the configuration" if path is None else str(path)
        problems = "; ".join(_explain(detail) for detail in error.errors())
        raise ConfigError(f"{where}: {problems}") from error


def json_schema() -> dict[str, Any]:
    """The JSON schema of the file, with every method's options."""
    return TuneConfig.model_json_schema()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML{_yaml_place(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values; `peer tune --init` writes an example")
    return values


def _yaml_place(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = "" if mark is None else f" on line {mark.line + 1}"
    return line + (f": {problem}" if problem else "")


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r} is not an override; write it as section.key=value, such as trainer.steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML{_yaml_place(error)}") from error
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {key!r} was given as a value, not as a section")
    values[keys[-1]] = value


def _merge(values: dict[str, Any], flags: dict[str, Any]) -> None:
    """Puts the flags over the file's values; one of steps and epochs takes the place of the other."""
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags and other not in flags:
            values.pop(other, None)
    for key, flag in flags.items():
        if isinstance(flag, dict) and isinstance(values.get(key), dict):
            _merge(values[key], flag)
        else:
            values[key] = flag


def _sections() -> dict[str, type[BaseModel]]:
    return {
        "": TuneConfig, "network": NetworkOptions, "data": DataConfig, "adapter": OPTIONS["lora"],
        "trainer": TrainerConfig, "samples": SamplesConfig,
    }  # fmt: skip


def _explain(detail: ErrorDetails) -> str:
    """One of pydantic's errors as a clause that says what to do."""
    place = [str(part) for part in detail["loc"]]
    method = place.pop(1) if len(place) > 1 and place[0] == "adapter" and place[1] in OPTIONS else None
    kind, dotted = detail["type"], ".".join(place)
    if kind == "extra_forbidden":
        return _unknown_key(place, method)
    if kind == "missing":
        return f"the key {dotted!r} is missing"
    if kind == "union_tag_not_found":
        return f"adapter.method is missing; one of {', '.join(OPTIONS)}"
    if kind == "union_tag_invalid":
        return f"adapter.method: {_unknown(str(detail['ctx']['tag']), list(OPTIONS), 'method')}"
    if kind == "too_short":
        return f"{dotted}: must not be empty"
    if kind == "model_type":
        return f"{dotted}: must hold keys and values (it is {detail['input']!r})"
    message = (
        detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be").replace("Input is", "is")
    )
    shown = "" if isinstance(detail["input"], dict | BaseModel) else f" (it is {detail['input']!r})"
    return f"{dotted}: {message}{shown}" if dotted else message


def _unknown_key(place: Sequence[str], method: str | None) -> str:
    section, key = ".".join(place[:-1]), place[-1]
    if method and key in METHODS[method].preset:
        return f"adapter: the method {method} sets {key!r} itself; leave it out"
    known = list((OPTIONS[method] if method else _sections()[section]).model_fields)
    elsewhere = {
        field: f"{name}.{field}".lstrip(".") for name, model in _sections().items() for field in model.model_fields
    }
    if not difflib.get_close_matches(key, known, n=1) and (close := difflib.get_close_matches(key, elsewhere, n=1)):
        return f"unknown key {'.'.join(place)!r}; did you mean {elsewhere[close[0]]!r}?"
    return (f"{section}: " if section else "") + _unknown(key, known, "key")


def _unknown(name: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"
