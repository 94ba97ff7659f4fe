"""What commands print, wherever it goes."""

import io
import sys
from pathlib import Path

import pytest
from rich.text import Text

from protocol.machine.terminal import new_console
from tests.tools.command import Command


def test_output_of_another_encoding_gets_escapes(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` writes what a model says in the same way."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("HIVETUNE_HOME", str(tmp_path / "schwärme…"))
    assert command("swarm", "create", "lab").code == 0
    assert command("swarm", "show", "lab").code == 0
    screen.flush()
    assert f"{tmp_path}/schw\xe4rme\\u2026".encode("latin-1") in screen.buffer.getvalue()


def test_no_path_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/a" * 100
    for is_terminal in ("0", "1"):
        monkeypatch.setenv("TTY_COMPATIBLE", is_terminal)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        console = new_console()
        console.print(f"the adapter is in {path}")
        console.print(Text(path))
        assert sys.stdout.getvalue() == f"the adapter is in {path}\n{path}\n"
