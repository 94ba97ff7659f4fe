"""Machines on which people type commands: a network namespace, and a home of its own for what it knows of swarms."""

import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tools.namespaces import Host
from tests.tools.swarm import ForkServer, Peer


@dataclass(frozen=True)
class Ended:
    """What has become of a command."""

    code: int
    stdout: str
    stderr: str


class Machine:
    """A host on which commands run as real processes."""

    def __init__(self, server: ForkServer, host: Host, folder: Path):
        self.host, self.home, self.cache = host, folder / "home", folder / "cache"
        self.folder = folder
        """Where commands run."""
        folder.mkdir()
        self._server = server
        self._numbers = itertools.count()
        self._running: list[Peer] = []

    def start(self, *argv: str, script: Path | None = None) -> Peer:
        """Begin `peer ARGV`, or `python SCRIPT ARGV`, which goes on until it is stopped."""
        stem = self.folder / f"command{next(self._numbers)}"
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        pid = self._server.start(
            argv, out, err, script=script, cwd=self.folder, home=self.home, cache=self.cache,
            network=self.host.space.path,
        )  # fmt: skip
        self._running.append(Peer(pid, out, err))
        return self._running[-1]

    def try_run(self, *argv: str, script: Path | None = None, timeout: float = 60) -> Ended:
        """`peer ARGV`, or `python SCRIPT ARGV`, to its end."""
        process, deadline = self.start(*argv, script=script), time.monotonic() + timeout
        while process.is_alive():
            assert time.monotonic() < deadline, f"peer {' '.join(argv)} hangs: {process.stderr.read_text()}"
            time.sleep(0.01)
        self._running.remove(process)
        code = int(process.stdout.with_suffix(".code").read_text())
        return Ended(code, process.stdout.read_text(), process.stderr.read_text())

    def run(self, *argv: str, script: Path | None = None) -> str:
        """What `peer ARGV`, or `python SCRIPT ARGV`, prints. It must succeed."""
        ended = self.try_run(*argv, script=script)
        assert ended.code == 0, f"peer {' '.join(argv)}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def turn_off(self, number: int = signal.SIGKILL) -> None:
        """End all that runs here, as when the power fails."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send(number)
        while any(process.is_alive() for process in self._running):
            time.sleep(0.01)
        self._running.clear()


@contextlib.contextmanager
def machines(server: ForkServer, folder: Path, *hosts: Host) -> Iterator[list[Machine]]:
    """One for each of `hosts`."""
    made = [Machine(server, host, folder / host.name) for host in hosts]
    try:
        yield made
    finally:
        for machine in made:
            machine.turn_off()
