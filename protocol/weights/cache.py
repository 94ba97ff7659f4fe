"""The models that were fetched from other members: each in a folder of its own, all of them within a bounded size.

ROOT/HASH/NAME/       the model's files; weights only when all of them are here
ROOT/HASH/.parts/     weights, sparse where pieces are missing; the list of pieces that are here; the manifest; the
                      model's name; a lock while it is in use
ROOT/kept/            manifests of folders of the user's own
ROOT/pins.json        name -> the version of open swarms that this machine uses under it, pinned at first use
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import BadRequest, BadUsage
from protocol.name import CACHE_SIZE, cache_folder
from protocol.records import ModelId
from protocol.weights.files import write_whole
from protocol.weights.manifest import Manifest
from protocol.weights.parts import Parts

_PARTS, _MANIFEST, _ABOUT, _LOCK = ".parts", "manifest.json", "model.json", "lock"

_UNSAFE = re.compile(r"[^\w.-]", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """One model in the cache."""

    model: ModelId
    manifest: str
    folder: Path
    held: int
    """Bytes that are here."""
    size: int
    """Bytes of the whole model."""
    used: float
    """When it was last opened, in seconds since the epoch."""


class Cache:
    """The fetched models under `root`."""

    def __init__(self, root: Path | None = None, size: int = CACHE_SIZE):
        self.root, self._size = root or cache_folder() / "models", size
        self._locks: dict[Path, int] = {}
        """Descriptors, each with a lock that others may share and nobody can have alone."""

    @property
    def kept(self) -> Path:
        """Where the manifests of users' own folders are kept."""
        return self.root / "kept"

    def open(self, manifest: Manifest, model: ModelId) -> Parts:
        """The parts of a model that are here, made if there are none; it stays while this process lives.

        Raises `OSError`.
        """
        place = self.root / manifest.hash
        inner = place / _PARTS
        inner.mkdir(parents=True, exist_ok=True)
        self._lock(inner)
        write_whole(inner / _MANIFEST, manifest.data)
        write_whole(inner / _ABOUT, model.to_bytes())
        folder = _files_in(place) or place / (_UNSAFE.sub("_", model.name.rpartition("/")[2]).lstrip(".") or "model")
        folder.mkdir(exist_ok=True)
        return Parts(manifest, folder, inner)

    def find(self, folder: Path) -> tuple[Manifest, ModelId] | None:
        """What a folder of this cache is of; `None` for any other folder."""
        return _read(folder.resolve().parent) if folder.is_dir() else None

    def manifest(self, sha256: str) -> Manifest | None:
        """That of a model in this cache."""
        known = _read(self.root / sha256)
        return known[0] if known else None

    def entries(self) -> Iterator[Entry]:
        """All models that are here, the one used last first."""
        found = []
        for place in self.root.iterdir() if self.root.is_dir() else ():
            known, folder = _read(place), _files_in(place)
            if known and folder:
                manifest, model = known
                with suppress(OSError):
                    held = Parts.held_in(place / _PARTS, manifest)
                    used = (place / _PARTS / _ABOUT).stat().st_mtime
                    found.append(Entry(model, manifest.hash, folder, held, manifest.size, used))
        yield from sorted(found, key=lambda entry: -entry.used)

    def remove(self, entry: Entry) -> bool:
        """Delete a model; `False`, and nothing is done, while a process uses it. Raises `OSError`."""
        place = entry.folder.parent
        descriptor = os.open(place / _PARTS / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def make_room(self, more: int, keep: str) -> None:
        """Let the models used longest ago go until `more` bytes of the model `keep` fit.

        Raises `BadUsage` when they do not fit the cache, or the disk.
        """
        entries = list(self.entries())
        held = sum(entry.held for entry in entries)
        for entry in reversed(entries):
            if held + more <= self._size:
                break
            if entry.manifest != keep and self.remove(entry):
                held -= entry.held
        if held + more > self._size:
            raise BadUsage(
                f"The cache of fetched models may take {self._size / 1e9:,.1f} GB and would take "
                f"{(held + more) / 1e9:,.1f} GB; allow more with --cache-size, or remove models (`peer cache list`)."
            )
        self.check_disk(more)

    def check_disk(self, more: int) -> None:
        """Raises `BadUsage` when the disk has no room for `more` bytes."""
        free = shutil.disk_usage(self.root).free
        if more > free:
            raise BadUsage(
                f"The disk is full: {more / 1e9:,.2f} GB are to be fetched into {self.root}, and {free / 1e9:,.2f} GB "
                "are free; make room, or have the cache elsewhere ($HIVETUNE_CACHE)."
            )

    def _lock(self, inner: Path) -> None:
        if inner not in self._locks:
            descriptor = os.open(inner / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._locks[inner] = descriptor

    def close(self) -> None:
        """Let others remove what was opened here."""
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()


def _read(place: Path) -> tuple[Manifest, ModelId] | None:
    """What a model's place in a cache is of; `None` for any other folder."""
    inner = place / _PARTS
    try:
        model = ModelId.from_bytes((inner / _ABOUT).read_bytes())
        return Manifest.from_bytes((inner / _MANIFEST).read_bytes(), place.name), model
    except (OSError, BadRequest):
        return None


def _files_in(place: Path) -> Path | None:
    """The folder with the model's files, under the name that the model had at first."""
    return next((path for path in place.iterdir() if path.name != _PARTS), None) if place.is_dir() else None
