"""Importing torch and Transformers quickly."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Within the block Python collects no cyclic garbage; imports belong in it.

    Modules make objects that stay. Looking through them for garbage, again and again, takes a seventh of the time in
    which torch and Transformers are imported.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
