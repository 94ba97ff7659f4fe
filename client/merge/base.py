"""A base model's folder read one tensor at a time; weights that bitsandbytes quantized come dequantized."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from protocol.errors import BadUsage
from protocol.model.checkpoint import INDEX_FILE, SINGLE_FILE

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_WANTED = ("consolidated*", "*/*")
_STATE_OF_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PACKED_4BIT = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_STATE_OF_8BIT = ("SCB", "weight_format")
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MergeError(BadUsage, ValueError):
    """The adapter cannot be merged into this base. The message is one sentence for a person."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint as it is read: dequantized, if it is stored quantized."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: Mapping[str, tuple[str, Path]] = field(default_factory=dict)
    """Of a quantized weight: name of a piece of its quantization state -> (its key, its file)."""


def find_folder(name: Path | str, what: str, files: tuple[str, ...], revision: str | None = None) -> Path:
    """The folder `name`, or a snapshot of the hub repository `name` with its `files` (glob patterns) at `revision`.

    Raises MergeError where there is neither; `what` says what was looked for.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        repository, allowed, ignored = str(name), list(files), list(_NOT_WANTED)
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MergeError(
            f"The {what} {str(name)!r} is neither a folder here nor a repository to be had from the hub ({reason})."
        ) from error


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises MergeError where it is missing or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MergeError(f"{file.parent} is not {what}: it has no {file.name}.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MergeError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} should hold a JSON object and holds a {type(content).__name__}.")
    return content


class BaseCheckpoint:
    """The safetensors files of the base model in `folder`. Raises MergeError for what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json", "a model folder")
        self.quantized = _is_bitsandbytes(self.config, folder)
        raw = dict(_scan(folder))
        states = _quantization_states(raw) if self.quantized else {}
        pieces = {key for state in states.values() for key, _ in state.values()}
        self.entries = {
            key: self._entry(key, entry, states.get(key, {})) for key, entry in raw.items() if key not in pieces
        }

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key`, mapped from its file (pages are read when used), or dequantized."""
        entry = self.entries[key]
        stored = _get(key, entry.file)
        if not entry.state:
            return stored
        if "SCB" in entry.state:
            return _dequantize_8bit(stored, self._piece(entry, "SCB")).to(entry.dtype)
        return _dequantize_4bit(stored, self._quant_state(key, entry.state))

    def _entry(self, key: str, raw: Entry, state: Mapping[str, tuple[str, Path]]) -> Entry:
        if "SCB" in state:
            self._check_row_format(key, state)
            return Entry(raw.file, raw.shape, stored_dtype(self.config) or torch.float16, state)
        if state:
            quant_state = self._quant_state(key, state)
            return Entry(raw.file, tuple(quant_state.shape), quant_state.dtype, state)
        if raw.dtype.is_floating_point and raw.dtype not in _PLAIN_DTYPES:
            raise MergeError(f"Tensor {key} of the base is stored as {raw.dtype}; use a float32, bf16 or f16 base.")
        return raw

    def _check_row_format(self, key: str, state: Mapping[str, tuple[str, Path]]) -> None:
        if "weight_format" in state and int(_get(*state["weight_format"])) != 0:
            raise MergeError(f"Tensor {key} of the base is stored in an old int8 layout; quantize the base anew.")

    def _piece(self, entry: Entry, name: str) -> torch.Tensor:
        return _get(*entry.state[name])

    def _quant_state(self, key: str, state: Mapping[str, tuple[str, Path]]) -> Any:
        pieces = {name: _get(*where) for name, where in state.items()}
        try:
            return _bitsandbytes().functional.QuantState.from_dict(pieces, torch.device("cpu"))
        except (KeyError, ValueError, AssertionError) as error:
            raise MergeError(f"The quantization state of {key} in the base is incomplete ({error}).") from error


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The floating point type that a config.json names, if it names one."""
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_bitsandbytes(config: Mapping[str, Any], folder: Path) -> bool:
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes":
        raise MergeError(
            f"The base {folder} is quantized with {method}; merge into one that is not quantized, or by bitsandbytes."
        )
    return True


def _scan(folder: Path) -> Iterator[tuple[str, Entry]]:
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    tensor = opened.get_tensor(key)
                    yield key, Entry(file, tuple(tensor.shape), tensor.dtype)
        except FileNotFoundError as error:
            raise MergeError(
                f"The base {folder} is incomplete: its index names {file.name}, which is missing."
            ) from error
        except (SafetensorError, OSError) as error:
            raise MergeError(f"{file} is not a sound safetensors file ({error}).") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE, "a model folder").get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise MergeError(f"{folder / INDEX_FILE} has no weight map of plain file names.")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    raise MergeError(
        f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}: save the base with `save_pretrained`, which writes them."
    )


def _get(key: str, file: Path) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(key)
    return tensor


def _quantization_states(raw: Mapping[str, Entry]) -> dict[str, dict[str, tuple[str, Path]]]:
    states: dict[str, dict[str, tuple[str, Path]]] = {}
    for key, entry in raw.items():
        for piece in (*_STATE_OF_4BIT, *_PACKED_4BIT, *_STATE_OF_8BIT):
            if key.endswith(f".{piece}"):
                stem = key.removesuffix(f".{piece}")
                weight = f"{stem}.weight" if piece in _STATE_OF_8BIT else stem
                if weight in raw:
                    states.setdefault(weight, {})[piece] = (key, entry.file)
    return states


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MergeError("The base is quantized with bitsandbytes, which is not installed here.") from error
    return bitsandbytes


def _dequantize_4bit(stored: torch.Tensor, quant_state: Any) -> torch.Tensor:
    weight: torch.Tensor = _bitsandbytes().functional.dequantize_4bit(stored, quant_state)
    return weight


def _dequantize_8bit(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = _bitsandbytes().functional.int8_vectorwise_dequant(stored, scales)
    return weight
