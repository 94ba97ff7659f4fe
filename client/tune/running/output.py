"""The output folder of a run: what lies where, and writing that never leaves something half-written in place of
something good."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from client.tune.description.config import TuneConfig
from client.tune.errors import ConfigError, OutputError

_LEAST_FREE = 1 << 20  # bytes; torch.save does not say why it failed, so a disk with less than this counts as full
# What may differ between a run and its continuation: where to, how far, how often. The data is compared by its tokens.
_FREE = {"output", "initial_peers", "swarm", "network", "device", "samples", "data"}
_FREE_TRAINER = {"steps", "epochs", "log_every", "eval_every", "save_every", "keep_checkpoints", "tensorboard"}


class RunFolder:
    """`root` and the paths in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record = root / "run.json"
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter"
        self.log = root / "log.jsonl"
        self.plot = root / "loss.png"
        self.samples = root / "samples.md"
        self.tensorboard = root / "tensorboard"

    def check(self, resume: bool) -> None:
        """Makes sure that a run can be written here, and (without `resume`) that none lies here yet. Leaves nothing.

        Raises:
            OutputError: the folder can't be created or written to, or holds a run.
        """
        with writing("files", self.root):
            missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root) as probe:
                probe.write(b"probe")
            for folder in missing:
                folder.rmdir()
        taken = [path.name for path in (self.record, self.checkpoints, self.adapter, self.log) if path.exists()]
        if taken and not resume:
            raise OutputError(
                f"{self.root} holds a run ({', '.join(taken)}); go on with it (--resume) or name another output"
            )

    def check_same(self, config: TuneConfig, fingerprint: str) -> None:
        """Makes sure that a run already written down here is this one.

        Args:
            config: the run.
            fingerprint: of its training rows.

        Raises:
            ConfigError: the run in this folder is another; the text names the first key that differs.
        """
        if self.record.exists():
            self._compare(_described(config, fingerprint))

    def begin(self, config: TuneConfig, fingerprint: str) -> None:
        """Writes down what this run is.

        Raises:
            OutputError: the folder can't be written to.
        """
        with writing(self.record.name, self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        replace_file(self.record, json.dumps(_described(config, fingerprint), indent=1).encode())

    def _compare(self, now: dict[str, Any]) -> None:
        try:
            before = json.loads(self.record.read_text(encoding="utf-8"))
            old, new = _fixed(before["config"]), _fixed(now["config"])
            data = before["config"]["data"].items()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{self.record} can't be read, so the run can't be resumed; name another output"
            ) from error
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{key} was {old.get(key)!r} when the run in {self.root} began and is {new.get(key)!r} now; a resumed"
                " run must keep it"
            )
        if before.get("data") != now["data"]:
            today = now["config"]["data"]
            changed = [f"data.{key} was {value!r}" for key, value in sorted(data) if today.get(key) != value]
            raise ConfigError(
                f"the training data is not what it was when the run in {self.root} began; restore it"
                + (f" ({', '.join(changed)})" if changed else "")
            )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of a configuration that a resumed run must keep, by dotted key."""
    flat = {key: value for key, value in config.items() if key not in _FREE and not isinstance(value, dict)}
    flat.update({f"adapter.{key}": value for key, value in config["adapter"].items()})
    trainer = {key: value for key, value in config["trainer"].items() if key not in _FREE_TRAINER}
    return flat | {f"trainer.{key}": value for key, value in trainer.items()}


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turns what goes wrong while `what` is written to `path` into one sentence.

    Raises:
        OutputError: in place of OSError, SafetensorError and the RuntimeError of torch.save.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OutputError(f"can't write {what} to {path}: {_reason(error, path)}") from error


def _reason(error: Exception, path: Path) -> str:
    # The disk is asked only where the error does not say: /proc and its like have no bytes free, and are not full.
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    else:
        there = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), Path("/"))
        full = "os error 28" in str(error) or shutil.disk_usage(there).free < _LEAST_FREE
    if full:
        return "no space is left there; free some and go on with --resume"
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under another name first, then renamed.

    Raises:
        OutputError: it can't be written; what was there before is still there.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path.name, path.parent):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends, and vanishes when the block fails.

    Raises:
        OutputError: it can't be written; what was at `path` before is still there.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with writing(path.name, path.parent):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            sync_folder(part)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Has the disk hold every file of the folder: a rename may otherwise outlive its content when the power fails."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _described(config: TuneConfig, fingerprint: str) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json", exclude_unset=False), "data": fingerprint}
