"""Having the disk read a peer's blocks while its modules are still being imported."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import BinaryIO

from huggingface_hub import try_to_load_from_cache

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100 * 2**20
"""Bytes; as safetensors has it."""
_PIECE = 2**17
"""Bytes asked for at once: Linux takes no more than the disk's read-ahead (`read_ahead_kb`), by default 128 KiB."""
_NUMBER = re.compile(r"\.(\d+)\.")
"""The first number in a tensor's name is its block's: `model.layers.3.mlp.experts.0.weight`, `h.3.attn.weight`."""


def begin_to_read(model: str, revision: str | None, blocks: range) -> None:
    """Ask the kernel, in the background, for the bytes of these blocks of a model that is on this machine.

    Merely advice, before anything about the model is known for certain: whatever is not as expected is passed over.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        Thread(target=_read_ahead, args=(model, revision, blocks), name="read ahead", daemon=True).start()


def _read_ahead(model: str, revision: str | None, blocks: range) -> None:
    # Loading tells what is wrong.
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        for path in _files(model, revision, blocks):
            with path.open("rb") as file:
                for start, end in _parts(file, blocks):
                    for at in range(start, end, _PIECE):
                        os.posix_fadvise(file.fileno(), at, min(_PIECE, end - at), os.POSIX_FADV_WILLNEED)


def _files(model: str, revision: str | None, blocks: range) -> set[Path]:
    """The files that have tensors of these blocks."""
    index = _find(model, revision, _INDEX)
    names = {_SINGLE}
    if index is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {str(file) for tensor, file in weight_map.items() if _block(tensor) in blocks}
    return {path for name in names if (path := _find(model, revision, name)) is not None}


def _find(model: str, revision: str | None, name: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    cached = try_to_load_from_cache(model, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def _parts(file: BinaryIO, blocks: range) -> Iterator[tuple[int, int]]:
    """Where the blocks' tensors lie in a safetensors file: bytes [start, end), neighbours as one."""
    size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER:
        return
    header = json.loads(file.read(size))
    tensors = sorted(tensor["data_offsets"] for name, tensor in header.items() if _block(name) in blocks)
    first = 8 + size
    while tensors:
        start, end = tensors.pop(0)
        while tensors and tensors[0][0] == end:
            end = tensors.pop(0)[1]
        yield first + start, first + end


def _block(tensor: str) -> int | None:
    number = _NUMBER.search(tensor)
    return int(number[1]) if number else None
