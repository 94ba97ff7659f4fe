"""Importing quickly."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Imports go in here. No collection of cyclic garbage meanwhile: what modules make is none, and to look through it
    again and again is a seventh of the time in which torch and Transformers are imported."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
