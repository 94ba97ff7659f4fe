"""The `peer` command run inside this process, for what ends by itself."""

import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from peer.commands import app as cli
from peer.commands import serve as serve_module

_PATIENCE = 30.0
"""Seconds after which a command that should have ended, and serves instead, is told to."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    def refusal(self) -> str:
        """The one sentence with which a command refused what it was given."""
        assert self.code == 2, self
        assert not self.stdout
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: ")
        assert lines[0].endswith((".", "?")), lines[0]
        assert len(lines[0]) < 600
        return lines[0]


class Command:
    """Runs `peer ARGUMENTS`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: Any) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["peer", *map(str, arguments)])
        for module in (cli, serve_module):
            self._monkeypatch.setattr(module, "leave_at_once", lambda: None)  # pytest goes on
        self._capsys.readouterr()
        timer = threading.Timer(_PATIENCE, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        finally:
            timer.cancel()
        captured = self._capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)
