"""Files that hold a secret: written whole or not at all, readable by their owner alone."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def create_private(path: Path, content: bytes) -> None:
    """Write a new file. Raises `FileExistsError` when there is one, and then leaves it as it is; `OSError`."""
    with _written(path, content) as part:
        os.link(part, path)  # a rename would replace a file that is there


def write_private(path: Path, content: bytes) -> None:
    """Write a file, in place of what may be there. Raises `OSError`."""
    with _written(path, content) as part:
        os.replace(part, path)


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """Write `content` to a temporary file beside `path`, on the disk; it is removed at the end of the block."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):  # the block has moved it
            os.unlink(name)
