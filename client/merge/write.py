"""Writing a checkpoint tensor by tensor: safetensors shards whose headers are planned before the data exist."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from client.merge.base import MergeError
from protocol.model.checkpoint import INDEX_FILE, SINGLE_FILE

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 24
"""Elements converted and written at a time: what a type conversion needs beyond the tensor itself."""
_SPARE = 1 << 26
"""Bytes of free disk space to ask for beyond the weights: config, tokenizer, index."""


@dataclass(frozen=True)
class Spec:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Shard:
    """One file in the making (format: https://github.com/huggingface/safetensors#format)."""

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        self.path, self.missing = path, {spec.name for spec in specs}
        self._offsets: dict[str, int] = {}
        self._file: BinaryIO | None = None
        # Readers view the bytes as the tensor's type in place, so wide types come first: all stay aligned.
        self._specs = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))

    def write(self, spec: Spec, tensor: torch.Tensor) -> None:
        file = self._file or self._start()
        file.seek(self._offsets[spec.name])
        for part in tensor.detach().contiguous().view(-1).split(_CHUNK):
            file.write(_converted(part, spec).view(torch.uint8).numpy().data)
        self.missing.discard(spec.name)
        if not self.missing:
            file.flush()
            os.fsync(file.fileno())
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self) -> BinaryIO:
        header, end = self._header()
        self._file = self.path.open("wb")
        self._file.write(len(header).to_bytes(8, "little") + header)
        start = 8 + len(header)
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        self._file.truncate(start + end)
        return self._file

    def _header(self) -> tuple[bytes, int]:
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in self._specs:
            self._offsets[spec.name] = end
            place = [end, end + spec.nbytes]
            table[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
            end += spec.nbytes
        header = json.dumps(table, separators=(",", ":")).encode()
        return header + b" " * (-len(header) % 8), end


class ShardWriter:
    """Writes the planned tensors, in any order, into shards of at most `max_shard_bytes` (a larger tensor: its own).

    Raises MergeError for a tensor of another shape than planned, or when the plan is not fulfilled at the end.
    """

    def __init__(self, folder: Path, plan: Sequence[Spec], max_shard_bytes: int) -> None:
        unknown = next((spec for spec in plan if spec.dtype not in _NAMES), None)
        if unknown is not None:
            raise MergeError(f"Tensor {unknown.name} is of type {unknown.dtype}, which cannot be written.")
        self.folder, self.nbytes = folder, sum(spec.nbytes for spec in plan)
        self._specs = {spec.name: spec for spec in plan}
        self._shards = [_Shard(folder / name, specs) for name, specs in _named(_split(plan, max_shard_bytes))]
        self._shard_of = {name: shard for shard in self._shards for name in shard.missing}

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self._shards)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the tensor `name`, converted to the planned type."""
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise MergeError(f"Tensor {name} should be {list(spec.shape)} and came out as {list(tensor.shape)}.")
        self._shard_of[name].write(spec, tensor)

    def finish(self) -> None:
        """Write the index, once every planned tensor is written."""
        missing = sorted(name for shard in self._shards for name in shard.missing)
        if missing:
            raise MergeError(f"{len(missing)} tensors were not written, {missing[0]} among them.")
        if self.shards > 1:
            weight_map = {name: shard.path.name for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for shard in self._shards:
            shard.close()


def check_out(out: Path) -> None:
    """Raises MergeError unless `out` is free: no file, and no folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists and is not an empty folder: name another one, or move it away.")


def check_space(out: Path, nbytes: int) -> None:
    """Raises MergeError unless the disk of `out` has room for `nbytes` of weights."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes + _SPARE:
        raise MergeError(
            f"The merged model needs {(nbytes + _SPARE) / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB left: "
            "free some space or name a folder on another disk."
        )


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in; it becomes `out` when the block ends well and vanishes otherwise."""
    work = out.absolute().with_name(f".{out.name}.merging-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        yield work
        if out.exists():
            out.rmdir()  # empty: `check_out`
        work.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MergeError(f"No space was left on the disk of {out} while writing; nothing was kept.") from error
        raise MergeError(f"Writing {out} failed ({error}); nothing was kept.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _converted(part: torch.Tensor, spec: Spec) -> torch.Tensor:
    converted = part.to(spec.dtype).contiguous()
    if spec.dtype == torch.float16 and part.dtype != torch.float16 and not converted.isfinite().all():
        raise MergeError(f"Tensor {spec.name} has values beyond float16's range: write the model as bfloat16.")
    return converted


def _split(plan: Sequence[Spec], max_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in plan:
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _named(shards: list[list[Spec]]) -> list[tuple[str, list[Spec]]]:
    if len(shards) == 1:
        return [(SINGLE_FILE, shards[0])]
    count = len(shards)
    return [(f"model-{i:05d}-of-{count:05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]
