"""Paths as people write them, read in one way: on the command line, in files, in Python."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator


def expand(name: str) -> str:
    """A folder, or a hub name, with a home in the place of `~` and `~user`. Raises `ValueError`: no such user."""
    expanded = os.path.expanduser(name)
    if expanded.startswith("~"):
        raise ValueError(f"{name} is in the home of a user that this machine does not have")
    return expanded


def local_path(text: str) -> Path:
    """A path on this machine. Raises `ValueError` where `expand` does, and for a URL, which a `Path` would mangle."""
    if "://" in text:
        raise ValueError(f"{text} is a URL; expected a path on this machine, so download or mount it first")
    return Path(expand(text))


def model_name(name: str) -> str:
    """What a folder, or a hub's model, is called: the folder's own name, whatever way leads to it."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _read(value: object) -> object:
    return local_path(str(value)) if isinstance(value, str | Path) else value


LocalPath = Annotated[Path, BeforeValidator(_read)]
"""A path in a pydantic model that people fill in."""
ModelName = Annotated[str, AfterValidator(expand)]
"""A folder or hub name in one."""
