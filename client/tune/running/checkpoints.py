"""Checkpoints that are whole or not there: written aside, sealed with their files' hashes, then renamed into place."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.tune.running.output import replacing_folder

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointStore:
    """The checkpoints of one run, `checkpoint-<step>` in `folder`; the newest `keep` of them are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into. It counts once the block has ended without an error; then
        the oldest ones go.

        Raises:
            OutputError: it can't be written; the ones before are untouched.
        """
        with replacing_folder(self.folder / f"checkpoint-{step}") as part:
            yield part
            seal = {str(path.relative_to(part)): _hash(path) for path in _files(part)}
            (part / SEAL).write_text(json.dumps(seal, indent=1), encoding="utf-8")
        for _, path in self._by_age()[: -self._keep]:
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint that is as it was written; a broken one is passed over."""
        return next((found for found in reversed(self._by_age()) if _is_whole(found[1])), None)

    def discard_after(self, step: int) -> None:
        """Removes what is newer than `step`: broken checkpoints, and what a killed run left unfinished."""
        for path in self.folder.glob(".checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        for number, path in self._by_age():
            if number > step:
                shutil.rmtree(path, ignore_errors=True)

    def _by_age(self) -> list[tuple[int, Path]]:
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("checkpoint-*") if path.is_dir())
        return sorted((int(match[1]), path) for match, path in found if match)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(seal) and seal == {str(path.relative_to(folder)): _hash(path) for path in _files(folder)}
    except (OSError, ValueError):
        return False
