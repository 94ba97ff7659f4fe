"""What commands print, on whatever they print it: a screen, a pipe, a file, in UTF-8 or not."""

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_ANY_WIDTH = 10_000
"""Columns of what is no screen: whoever reads it wants whole paths and whole cells."""


def escape_what_cannot_be_written() -> None:
    """From now on letters that the output's encoding lacks are written as `\\u2026`, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def new_console(*, stderr: bool = False) -> "Console":
    """A console that breaks no line of text: a screen does that itself, and a path stays whole when it is copied."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    return console
