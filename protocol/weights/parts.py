"""A model's files on this machine, in whole or in part, and which pieces of them are there."""

import hashlib
import mmap
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from protocol.errors import BadRequest, PeerFailed
from protocol.weights.manifest import Manifest

_PIECES = "pieces"
_ABSENT, _WRITTEN, _SETTLED = 0, 1, 2
"""What stands for each piece in the list of pieces: not here; written, by a fetch that may have been ended in the
middle or by another process; on the disk for good."""


class Held:
    """A model of which all files are here."""

    def __init__(self, manifest: Manifest, paths: Mapping[str, Path]):
        """`paths`: file -> where it lies."""
        self.manifest, self._paths = manifest, paths

    def find(self, file: str) -> Path | None:
        """Where a file of the model lies."""
        return self._paths.get(file)

    def has(self, number: int) -> bool:
        """Whether a piece is here."""
        return 0 <= number < len(self.manifest.pieces)

    def holdings(self) -> np.ndarray:
        """Which pieces are here: bool, one for each."""
        return np.ones(len(self.manifest.pieces), dtype=bool)

    def read(self, number: int) -> bytes:
        """A piece's bytes, checked. Raises `BadRequest` for one that is not here, `PeerFailed` when it has changed."""
        if not self.has(number):
            raise BadRequest(f"Piece {number} of {self.manifest.hash[:12]}… is not here.")
        data = self._read_unchecked(number)
        if hashlib.sha256(data).hexdigest() != self.manifest.pieces[number].sha256:
            raise PeerFailed(f"{self.manifest.pieces[number].file} has been changed since this peer began to share it.")
        return data

    def _read_unchecked(self, number: int) -> bytes:
        piece = self.manifest.pieces[number]
        try:
            with self._paths[piece.file].open("rb") as file:
                return os.pread(file.fileno(), piece.size, piece.start)
        except OSError as error:
            raise PeerFailed(f"{piece.file} cannot be read any more.") from error


class Parts(Held):
    """A model in a folder of its own, whose pieces come one by one. Several processes may add to it at once.

    Every piece is checked before it counts: what was written by a process that was killed is checked when it is asked
    for, and not fetched again. Weights lie in another folder, out of reach of programs that would read zeros where a
    piece is missing; they are seen in the model's folder when all of them are here.
    """

    def __init__(self, manifest: Manifest, folder: Path, inner: Path):
        """`inner`: a folder beside `folder` for weights, and for the list of pieces that are here. Raises `OSError`."""
        weights = [file.name for file in manifest.files if file.name.endswith(".safetensors")]
        places = {file.name: (inner if file.name in weights else folder) / file.name for file in manifest.files}
        super().__init__(manifest, places)
        self.folder, self._inner, self._weights = folder, inner, weights
        for file in manifest.files:
            with places[file.name].open("ab") as opened:
                os.ftruncate(opened.fileno(), file.size)  # sparse: takes no room until there is something in it
        with (inner / _PIECES).open("ab") as opened:
            os.ftruncate(opened.fileno(), len(manifest.pieces))
        with (inner / _PIECES).open("r+b") as opened:
            self._states = mmap.mmap(opened.fileno(), len(manifest.pieces))
        self._checked = set[int]()
        """Pieces that this process has written or read since it began."""

    def has(self, number: int) -> bool:
        """See `Held.has`."""
        return super().has(number) and (self._states[number] == _SETTLED or number in self._checked)

    def holdings(self) -> np.ndarray:
        """See `Held.holdings`."""
        found: np.ndarray = np.frombuffer(self._states[:], dtype=np.uint8) == _SETTLED
        found[list(self._checked)] = True
        return found

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that are not here, after a look at what others have left half done. Reads files."""
        return [number for number in numbers if not self.has(number) and not self._check(number)]

    def _check(self, number: int) -> bool:
        if self._states[number] == _ABSENT:
            return False
        if hashlib.sha256(self._read_unchecked(number)).hexdigest() != self.manifest.pieces[number].sha256:
            self._states[number] = _ABSENT
            return False
        self._checked.add(number)
        return True

    def write(self, number: int, data: bytes | bytearray | memoryview) -> bool:
        """Take a piece; `False`, and nothing is done, when these bytes are not it. Raises `OSError`: a full disk."""
        piece = self.manifest.pieces[number]
        if hashlib.sha256(data).hexdigest() != piece.sha256:
            return False
        with self._paths[piece.file].open("r+b") as file:
            view, start = memoryview(data), piece.start
            while view:
                written = os.pwrite(file.fileno(), view, start)
                view, start = view[written:], start + written
        if self._states[number] == _ABSENT:
            self._states[number] = _WRITTEN
        self._checked.add(number)
        return True

    def settle(self, numbers: Collection[int]) -> None:
        """Have these pieces, which are all here, on the disk for good. Raises `OSError`."""
        loose = [number for number in numbers if self._states[number] != _SETTLED]
        for name in {self.manifest.pieces[number].file for number in loose}:
            with self._paths[name].open("r+b") as file:
                os.fsync(file.fileno())
        for number in loose:
            self._states[number] = _SETTLED
        if self.holdings().all():
            for name in self._weights:
                with suppress(FileExistsError):
                    (self.folder / name).symlink_to(Path("..", self._inner.name, name))

    @staticmethod
    def held_in(inner: Path, manifest: Manifest) -> int:
        """Bytes of a model that are here, by the list of pieces in `inner`. Raises `OSError`."""
        states = (inner / _PIECES).read_bytes()
        return manifest.bytes_of(number for number, state in enumerate(states) if state)
