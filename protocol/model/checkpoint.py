"""A checkpoint: a local folder or a hub name, of which only the needed tensors are fetched and read."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from protocol.errors import UnsupportedModel, first_line
from protocol.machine.paths import expand, model_name
from protocol.model.anatomy import num_blocks
from protocol.records import MAX_BLOCKS, ModelId

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_VOLATILE = {
    "transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype", "architectures", "use_cache",
    "id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id",
    "quantization_config", "auto_map", "_attn_implementation", "attn_implementation", "task_specific_params",
}  # fmt: skip
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_MAX_HEADER = 100 * 2**20
"""Bytes of the header of a safetensors file: no more are read by safetensors either."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors call the dtypes that a model may be loaded in."""


@dataclass(frozen=True)
class Hub:
    """How files come from the Hugging Face hub; the fields are arguments of `hf_hub_download`."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


class Source(Protocol):
    """Where the bytes of files come from that are here in part only."""

    name: str
    """Of the model, in the swarm that has it."""
    label: str
    """Its name and version, as people may type them."""
    digests: Mapping[str, str]
    """File of weights -> its digest, as of the whole file."""

    def find(self, file: str) -> Path | None:
        """Where a file lies, if the model has one of that name."""

    def need(self, ranges: Mapping[str, Iterable[tuple[int, int]]]) -> None:
        """Have these bytes here, file -> [start, end); returns when they are. Raises `SwarmError`."""


class Layout(NamedTuple):
    """What the header of a safetensors file says."""

    data_start: int
    """The file's first byte that is not of the header."""
    tensors: dict[str, tuple[int, int]]
    """Tensor -> bytes [start, end) of the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files. Nothing but the configuration is read until it is asked for."""

    name: str
    """The folder or the hub name that the user gave."""
    revision: str | None
    config: PreTrainedConfig
    raw_config: dict[str, Any]
    hub: Hub = Hub()
    source: Source | None = None
    """Of a folder whose files are fetched from the swarm as they are needed; headers of weights are here already."""
    called: str | None = None
    """What the swarm is to call the model; None: by its folder or its hub name."""

    @cached_property
    def folder(self) -> Path:
        """Where the configuration lies."""
        path = self._optional_file(_CONFIG)
        assert path is not None
        return path.parent

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that Transformers loads the weights in: the configuration's, or else their own.

        Raises `UnsupportedModel` when it takes the weights to know it and they are missing or broken.
        """
        stored = self.config.dtype or self.config.get_text_config().dtype
        return stored if isinstance(stored, torch.dtype) else self._dtype_of_weights()

    def _dtype_of_weights(self) -> torch.dtype:
        """That of the first floating-point weight; only the header of its file is fetched."""
        name = min(self.weight_map.values())
        local = self.local_file(name)
        if local is not None:
            with _open(local) as file:
                names = sorted(file.keys())
                found = [file.get_slice(tensor).get_dtype() for tensor in names]
        else:
            try:
                api = HfApi(token=self.hub.token)
                header = api.parse_safetensors_file_metadata(self.name, name, revision=self.revision)
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise UnsupportedModel(
                    f"{self.name}: the header of {name} cannot be fetched ({first_line(error)})."
                ) from error
            found = [header.tensors[tensor].dtype for tensor in sorted(header.tensors)]
        return next((_FLOATS[dtype] for dtype in found if dtype in _FLOATS), torch.float32)

    @cached_property
    def model_id(self) -> ModelId:
        """What identifies the model in a swarm."""
        essential = {k: v for k, v in self.raw_config.items() if k not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(essential, sort_keys=True).encode()).hexdigest()[:32]
        name = self.called or (self.source.name if self.source is not None else model_name(self.name))
        name = "".join(letter if letter.isprintable() else "?" for letter in name[:200])
        return ModelId(name=name, config_hash=digest, num_blocks=num_blocks(self.config))

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> the file that holds it."""
        index = self._optional_file(INDEX_FILE)
        if index is not None:
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UnsupportedModel(f"{index} has no weight_map of tensors to files; download the model again.")
            return weight_map
        single = self._optional_file(SINGLE_FILE)
        if single is None:
            raise UnsupportedModel(
                f"{self.name} has neither {SINGLE_FILE} nor {INDEX_FILE}; expected weights in safetensors format "
                "(save the model once with `save_pretrained`)."
            )
        with _open(single) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)

    def state_dict(self, wanted: Callable[[str], bool]) -> dict[str, Any]:
        """Name -> lazy safetensors slice, for the tensors whose name is `wanted`. Fetches just their files, or where
        these come from the swarm just their bytes.

        Raises `UnsupportedModel` for a missing or broken shard, and as `Source.need`.
        """
        names = [name for name in self.weight_map if wanted(name)]
        if self.source is not None:
            self.source.need(self._ranges(names))
        files = {file: _open(self._file(file)) for file in sorted({self.weight_map[name] for name in names})}
        try:
            return {name: files[self.weight_map[name]].get_slice(name) for name in names}
        except SafetensorError as error:
            raise UnsupportedModel(f"{self.name}: the index names a tensor that no shard holds ({error}).") from error

    def fetch_all(self) -> None:
        """Have every file of weights on this machine. Raises `UnsupportedModel` where the hub has not all of them."""
        for file in sorted(set(self.weight_map.values())):
            self._file(file)

    def _ranges(self, names: Iterable[str]) -> dict[str, list[tuple[int, int]]]:
        """File -> the bytes of those of the tensors `names` that lie in it."""
        found: dict[str, list[tuple[int, int]]] = {}
        layouts = {file: read_layout(self._file(file)) for file in {self.weight_map[name] for name in names}}
        for name in names:
            file = self.weight_map[name]
            if name in layouts[file].tensors:
                found.setdefault(file, []).append(layouts[file].tensors[name])
        return found

    @cached_property
    def digests(self) -> dict[str, str]:
        """File -> digest, of the index and of every weight file that is on this machine already.

        The digest covers a file's size, its header and evenly spread samples: enough to tell another revision or
        another fine-tuning apart without reading hundreds of gigabytes; it is no protection against forgery.
        """
        index = hashlib.sha256(json.dumps(self.weight_map, sort_keys=True).encode()).hexdigest()[:32]
        if self.source is not None:
            return {INDEX_FILE: index, **self.source.digests}
        files = {name: self.local_file(name) for name in sorted(set(self.weight_map.values()))}
        return {INDEX_FILE: index, **{name: _sampled_digest(path) for name, path in files.items() if path is not None}}

    def _file(self, name: str) -> Path:
        path = self._optional_file(name)
        if path is None:
            raise UnsupportedModel(f"{self.name} lacks its shard {name}; download the model again.")
        return path

    def _optional_file(self, name: str) -> Path | None:
        if self.source is not None:
            return self.source.find(name)
        return find_file(self.name, name, self.revision, self.hub)

    def local_file(self, name: str) -> Path | None:
        """Where a file is on this machine, if it is; nothing is fetched."""
        if Path(self.name).is_dir():
            return self._optional_file(name)
        cached = try_to_load_from_cache(self.name, name, cache_dir=self.hub.cache_dir, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None


def open_checkpoint(
    model: str, revision: str | None = None, hub: Hub = Hub(), source: Source | None = None
) -> Checkpoint:
    """The checkpoint in the folder, or of the hub name, `model`; `source`: what fetches the rest of a folder's files.

    Raises `UnsupportedModel` when there is no such folder or hub model, or its configuration is no model's.
    """
    try:
        model = expand(model)
    except ValueError as error:
        raise UnsupportedModel(f"{error}.") from error
    path = find_file(model, _CONFIG, revision, hub)
    if path is None:
        if find_file(model, _ADAPTER_CONFIG, revision, hub) is not None:
            raise UnsupportedModel(
                f"{model!r} is a PEFT adapter, not a model; name the model that it was trained on, and load the "
                "adapter by PeftModel.from_pretrained or --adapter."
            )
        raise UnsupportedModel(
            f"{model!r} has no {_CONFIG}; expected a Hugging Face model folder, the name of a model that the swarm "
            "has, or a hub name that can be reached."
        )
    raw = _read_json(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        blocks = num_blocks(config)
    except Exception as error:  # Transformers' refusals come as many types
        raise UnsupportedModel(
            f"{path} does not describe a language model that Transformers knows ({first_line(error)})."
        ) from error
    if not 0 < blocks <= MAX_BLOCKS:
        raise UnsupportedModel(f"{path} describes a model of {blocks} blocks; expected 1 to {MAX_BLOCKS}.")
    return Checkpoint(model, revision, config, raw, hub, source)


def is_here(model: str, revision: str | None = None, hub: Hub = Hub()) -> bool:
    """Whether `model` is a folder, or a hub's that was opened on this machine before."""
    if Path(model).is_dir() or not may_be_on_hub(model):
        return Path(model).is_dir()
    try:
        found = try_to_load_from_cache(model, _CONFIG, cache_dir=hub.cache_dir, revision=revision)
    except ValueError:  # no hub's name
        return False
    return isinstance(found, str)


def may_be_on_hub(model: str) -> bool:
    """Whether a name that is no folder here can be a hub's, by its form."""
    return not model.startswith((".", "/")) and model.count("/") <= 1


def find_file(model: str, name: str, revision: str | None = None, hub: Hub = Hub()) -> Path | None:
    """The local path of a file of `model`, downloaded when it is a hub model; `None` when there is no such file."""
    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not may_be_on_hub(model):
        return None
    try:
        return Path(hf_hub_download(model, name, revision=revision, **asdict(hub)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def read_layout(path: Path) -> Layout:
    """Where the tensors of a safetensors file lie. Raises `UnsupportedModel` for a file that is none."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        start = 8 + length
        offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: (start + int(first), start + int(last)) for name, (first, last) in offsets.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise UnsupportedModel(
            f"{path} is not a whole safetensors file ({first_line(error)}); download it again."
        ) from error
    if any(not start <= first <= last <= size for first, last in tensors.values()):
        raise UnsupportedModel(f"{path} is not a whole safetensors file (tensors lie outside); download it again.")
    return Layout(start, tensors)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(f"{path} is not a whole safetensors file ({error}); download it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} is not readable as JSON ({first_line(error)}).") from error
    if not isinstance(data, dict):
        raise UnsupportedModel(f"{path} holds no JSON object.")
    return data


def _sampled_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, 2**24)))
        for i in range(_SAMPLES):
            file.seek(8 + header + (size - 8 - header) * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
