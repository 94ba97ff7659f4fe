"""What this project is called, said once: its folders, its environment variables and its names on the wire."""

import os
from pathlib import Path

NAME = "hivetune"
"""The distribution's name, as `pip install` takes it."""
CACHE_VARIABLE = f"{NAME.upper()}_CACHE"


def cache_folder() -> Path:
    """`$HIVETUNE_CACHE`, or `~/.cache/hivetune` where that is unset or empty. The folder may not be there yet."""
    return Path(os.environ.get(CACHE_VARIABLE) or f"~/.cache/{NAME}").expanduser()
