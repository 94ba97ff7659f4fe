"""A model of the hub, as its client keeps it on this machine: tests are offline, and it is found there."""

from collections.abc import Mapping
from pathlib import Path

import pytest


def keep_revisions(cache: Path, name: str, revisions: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hub's model `name` in `cache`, at each revision the files of a folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots").mkdir(exist_ok=True)
        (repository / "snapshots" / commit).symlink_to(folder.resolve())
