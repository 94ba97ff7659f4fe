"""What this project is called, said once: its folders, its environment variables and its names on the wire."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import platformdirs

NAME = "hivetune"
"""The distribution's name, as `pip install` takes it."""
CACHE_VARIABLE = f"{NAME.upper()}_CACHE"
HOME_VARIABLE = f"{NAME.upper()}_HOME"
CACHE_SIZE = 200 * 10**9
"""Bytes that the models which are fetched from other members may take together, where nobody says otherwise."""


def cache_folder() -> Path:
    """`$HIVETUNE_CACHE`, or `~/.cache/hivetune` where that is unset or empty. The folder may not be there yet."""
    return Path(os.environ.get(CACHE_VARIABLE) or f"~/.cache/{NAME}").expanduser()


def home_folder() -> Path:
    """`$HIVETUNE_HOME`, or the user's folder for configuration (Linux: `~/.config/hivetune`). May not be there yet."""
    given = os.environ.get(HOME_VARIABLE)
    return Path(given).expanduser() if given else platformdirs.user_config_path(NAME)


def installed_version() -> str:
    """That of the installed distribution; 0+source where it is not installed."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "0+source"
