"""What a model's files are, piece by piece. The SHA-256 of a manifest is the model's identity."""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.errors import BadRequest, first_problem
from protocol.records import Sha256

MAX_PIECE = 4 * 2**20
"""Bytes of one piece."""
MAX_MANIFEST = 32 * 2**20
"""Bytes of a manifest: about what 1.5 TB of weights take."""
MAX_FILES = 4096
MAX_PIECES = 2**19
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken")
"""Of the files that travel: none of them is code, nor is code run by reading one."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$")]
"""A name in one folder, which leads nowhere else."""
Size = Annotated[int, Field(gt=0, le=MAX_PIECE)]


class Piece(NamedTuple):
    """Bytes [start, end) of a file, and their SHA-256 (hexadecimal)."""

    file: str
    start: int
    end: int
    sha256: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class FileEntry(BaseModel):
    """One file, as the pieces that it is made of, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FileName
    pieces: tuple[tuple[Size, Sha256], ...] = Field(max_length=MAX_PIECES)
    """Bytes and SHA-256 of each."""
    digest: Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")] = ""
    """Of a file of weights what `Checkpoint.digests` has for it, by which peers and clients compare weights."""

    @cached_property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(size for size, _ in self.pieces)


class Manifest(BaseModel):
    """All files of a model that are needed to serve or to use it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=MAX_FILES)

    @model_validator(mode="after")
    def _is_one_folder(self) -> Self:
        names = [file.name for file in self.files]
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("a file is named twice")
        if wrong := [name for name in names if not name.endswith(SUFFIXES)]:
            raise ValueError(f"{wrong[0]} is no file of a model")
        if "config.json" not in names:
            raise ValueError("it has no config.json")
        if sum(len(file.pieces) for file in self.files) > MAX_PIECES:
            raise ValueError(f"it has more than {MAX_PIECES} pieces")
        if not all(file.pieces for file in self.files):
            raise ValueError("a file is empty")
        return self

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Of all files, in order: a piece's number is its place here."""
        found = []
        for file in self.files:
            start = 0
            for size, sha256 in file.pieces:
                found.append(Piece(file.name, start, start + size, sha256))
                start += size
        return tuple(found)

    @cached_property
    def numbers(self) -> dict[str, range]:
        """File -> the numbers of its pieces."""
        found, first = {}, 0
        for file in self.files:
            found[file.name] = range(first, first + len(file.pieces))
            first += len(file.pieces)
        return found

    @cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of each piece: int64."""
        return np.array([piece.size for piece in self.pieces], dtype=np.int64)

    @cached_property
    def data(self) -> bytes:
        """Canonical JSON: equal for equal files."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of `data`, hexadecimal: the model's identity."""
        return hashlib.sha256(self.data).hexdigest()

    def covering(self, file: str, start: int, end: int) -> list[int]:
        """The numbers of the pieces that hold bytes [start, end) of a file. Raises `KeyError` for an unknown one."""
        numbers = self.numbers[file]
        first = bisect_right(self.pieces, start, numbers.start, numbers.stop, key=lambda piece: piece.end)
        last = bisect_left(self.pieces, end, numbers.start, numbers.stop, key=lambda piece: piece.start)
        return list(range(first, last))

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Bytes of these pieces together."""
        return sum(self.pieces[number].size for number in numbers)

    @classmethod
    def from_bytes(cls, data: bytes, expected: str) -> Self:
        """The manifest whose hash is `expected`. Raises `BadRequest` for any other, and for what is none."""
        if len(data) > MAX_MANIFEST:
            raise BadRequest(f"A manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST}.")
        if hashlib.sha256(data).hexdigest() != expected:
            raise BadRequest(f"This is not the manifest {expected[:12]}….")
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise BadRequest(f"Not a manifest: {first_problem(error)[1]}.") from error
        if manifest.data != data:
            raise BadRequest("Not a manifest: it is not written as one.")
        return manifest
