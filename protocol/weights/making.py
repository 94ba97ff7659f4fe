"""The manifest of a folder: made once, kept until a file changes."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from pydantic import ValidationError

from protocol.errors import BadRequest, UnsupportedModel, first_line, first_problem
from protocol.model.checkpoint import Checkpoint, read_layout
from protocol.weights.files import write_whole
from protocol.weights.manifest import MAX_PIECE, SUFFIXES, FileEntry, Manifest
from protocol.weights.parts import Held

_BLOCK = re.compile(r"(.*?\.\d+)\.")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_LEFT_OUT = ("adapter_", "trainer_state", "training_args", "optimizer", "all_results", "train_results", "eval_results")
"""What lies beside a model in folders that were trained into, and is no part of it."""
_MAX_SMALL = 256 * 2**20
"""Bytes of a file that is not of the weights, a tokenizer's above all."""


def hold(checkpoint: Checkpoint, kept: Path, stopped: threading.Event | None = None) -> Held | None:
    """All files of `checkpoint`, ready to be given to others; `None` where some of its weights are not here.

    Reads all of it, unless its manifest lies in the folder `kept` and no file has changed. Takes a second for each
    gigabyte or so: for a thread of its own, which ends soon after `stopped` is set. Raises `UnsupportedModel` then, and
    for files that cannot be read.
    """
    try:
        paths = _files(checkpoint)
        if paths is None:
            return None
        state = {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in sorted(paths.items())}
        manifest = _read(_place(checkpoint, kept), state) or _make(checkpoint, paths, stopped)
        now = {name: [path.stat().st_size, path.stat().st_mtime_ns] for name, path in sorted(paths.items())}
    except OSError as error:
        raise UnsupportedModel(f"The files of {checkpoint.name} cannot be read ({first_line(error)}).") from error
    except ValidationError as error:
        raise UnsupportedModel(f"{checkpoint.name} cannot be given to others: {first_problem(error)[1]}.") from error
    if now != state:
        raise UnsupportedModel(f"The files of {checkpoint.name} were changed while they were read.")
    _keep(_place(checkpoint, kept), state, manifest)
    return Held(manifest, paths)


def _files(checkpoint: Checkpoint) -> dict[str, Path] | None:
    """Name -> place, of all that belongs to a model; `None` where a file of weights is not here."""
    weights = {name: checkpoint.local_file(name) for name in sorted(set(checkpoint.weight_map.values()))}
    if not all(weights.values()) or not all(map(_NAME.fullmatch, weights)):
        return None
    others = {
        path.name: path
        for path in sorted(checkpoint.folder.iterdir())
        if path.name.endswith(SUFFIXES)
        and not path.name.endswith(".safetensors")
        and not path.name.startswith(_LEFT_OUT)
        and _NAME.fullmatch(path.name)
        and path.is_file()
        and 0 < path.stat().st_size <= _MAX_SMALL
    }
    return others | {name: path for name, path in weights.items() if path is not None}


def _make(checkpoint: Checkpoint, paths: Mapping[str, Path], stopped: threading.Event | None) -> Manifest:
    files = []
    for name, path in sorted(paths.items()):
        pieces = []
        with path.open("rb") as file:
            for size in _cuts(path):
                if stopped is not None and stopped.is_set():
                    raise UnsupportedModel(f"{checkpoint.name} was not read to its end, as this process is to end.")
                pieces.append((size, hashlib.sha256(file.read(size)).hexdigest()))
        files.append(FileEntry(name=name, pieces=tuple(pieces), digest=checkpoint.digests.get(name, "")))
    return Manifest(files=tuple(files))


def _cuts(path: Path) -> Iterator[int]:
    """The sizes of a file's pieces. Of weights the header is one, and none has parts of two blocks: who needs a block
    fetches nothing else."""
    size = path.stat().st_size
    runs = [(0, size)]
    if path.name.endswith(".safetensors"):
        layout = read_layout(path)
        spans = sorted((*span, name) for name, span in layout.tensors.items() if span[0] < span[1])
        grouped = [list(group) for _, group in groupby(spans, lambda span: _block(span[2]))]
        starts = [layout.data_start, *(group[0][0] for group in grouped[1:])]
        runs = list(zip([0, *starts], [*starts, size], strict=True))
    for start, end in runs:
        for first in range(start, end, MAX_PIECE):
            yield min(MAX_PIECE, end - first)


def _block(tensor: str) -> str:
    match = _BLOCK.match(tensor)
    return match[1] if match else ""


def _place(checkpoint: Checkpoint, kept: Path) -> Path:
    return kept / f"{hashlib.sha256(str(checkpoint.folder.resolve()).encode()).hexdigest()[:32]}.json"


def _read(path: Path, state: Mapping[str, list[int]]) -> Manifest | None:
    """The manifest that was kept, if it is of files of the same sizes and times."""
    try:
        found = json.loads(path.read_bytes())
        if found["state"] != state:
            return None
        return Manifest.from_bytes(found["manifest"].encode(), found["hash"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BadRequest):
        return None


def _keep(path: Path, state: Mapping[str, list[int]], manifest: Manifest) -> None:
    content = json.dumps({"state": state, "manifest": manifest.data.decode(), "hash": manifest.hash})
    with suppress(OSError):  # it will be made again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())
