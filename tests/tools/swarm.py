"""Real peers for tests: processes on loopback that run the `peer` command."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from client import AutoDistributedModelForCausalLM
from tests.tools.device_library import is_loaded

_ROOT = Path(__file__).parents[2]
_READY = re.compile(r"^ready address=(\S+)(?: blocks=(\d+):(\d+) model=(\S+))?", re.M)
_GAVE = re.compile(r"gave (\d+) pieces of weights, (\d+) bytes")


class ForkServer:
    """See `fork_server.py`. `pretended_gpu`, or where this process has it: its peers have a pretended GPU each."""

    def __init__(self, pretended_gpu: bool = False) -> None:
        gpu = ["pretended-gpu"] if pretended_gpu or is_loaded() else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.fork_server", *gpu], cwd=_ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout
        assert self._process.stdout.readline().strip() == "ready"

    def start(
        self,
        argv: Sequence[str],
        stdout: Path,
        stderr: Path,
        *,
        lie: str | None = None,
        script: Path | None = None,
        cwd: Path | None = None,
        home: Path | None = None,
        cache: Path | None = None,
        network: Path | None = None,
    ) -> int:
        """Start `peer ARGV`, or `python SCRIPT ARGV`, whose output goes into files. Returns its process ID.

        `home`: of the machine that it is on, as far as private swarms go; None: of one that knows none. `cache`: its
        `$HIVETUNE_CACHE`, as if it were on a machine of its own. `network`: see `namespaces.Space`.
        """
        assert self._process.stdin
        assert self._process.stdout
        paths = {"stdout": stdout, "stderr": stderr, "script": script, "cwd": cwd}
        paths |= {"home": home, "cache": cache, "network": network}
        request = {"argv": list(argv), "lie": lie} | {name: path and str(path) for name, path in paths.items()}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def run(self, *argv: str, cwd: Path, script: Path | None = None, home: Path | None = None) -> str:
        """What `peer ARGV`, or `python SCRIPT ARGV`, prints. It must succeed, within four minutes."""
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "out"), Path(folder, "err")
            process = Peer(self.start(argv, stdout, stderr, script=script, cwd=cwd, home=home), stdout, stderr)
            deadline = time.monotonic() + 240
            while process.is_alive():
                if time.monotonic() > deadline:
                    process.kill()
                time.sleep(0.02)
            code = stdout.with_suffix(".code")
            assert code.exists(), "it was killed"
            assert code.read_text() == "0", stdout.read_text() + stderr.read_text()
            return stdout.read_text()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


def wait_for_line(file: Path, number: int) -> str:
    """A line that a process writes into a file, when it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) > number:
            return lines[number]
        time.sleep(0.02)
    raise AssertionError(f"no line {number} in {file}")


@dataclass
class Peer:
    """A running `peer serve` or `peer bootstrap`."""

    pid: int
    stdout: Path
    stderr: Path
    address: str = ""
    blocks: range = range(0)

    @property
    def peer_id(self) -> str:
        return self.address.rpartition("/")[2]

    def wait_ready(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if match := _READY.search(self.stdout.read_text() if self.stdout.exists() else ""):
                self.address = match[1]
                self.blocks = range(int(match[2] or 0), int(match[3] or 0))
                return
            if not self.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"the peer did not get ready: {self.stderr.read_text()}")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self.stop(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 10) -> float:
        """Signal, wait until it is gone; the seconds that took."""
        start = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self.send(number)
        while self.is_alive():
            if time.monotonic() - start > timeout:
                with contextlib.suppress(ProcessLookupError):
                    self.send(signal.SIGKILL)
                raise AssertionError(f"peer {self.pid} did not end within {timeout} s: {self.stderr.read_text()}")
            time.sleep(0.01)
        return time.monotonic() - start

    def is_alive(self) -> bool:
        return Path(f"/proc/{self.pid}").exists()

    def bytes_given(self) -> int:
        """Bytes of weights that it has given to others since its start."""
        before = len(_GAVE.findall(self.stderr.read_text()))
        self.send(signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while len(found := _GAVE.findall(self.stderr.read_text())) == before:
            assert time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.02)
        return int(found[-1][1])

    def rss(self) -> int:
        """Bytes of anonymous memory."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.M)[1]) * 1024  # type: ignore[index]


class Swarm:
    """Peers that found or join one swarm."""

    def __init__(self, server: ForkServer, folder: Path):
        self._server, self._folder = server, folder
        self.home: Path | None = None
        """See `ForkServer.start`; of what is launched from now on."""
        self.peers: list[Peer] = []

    @property
    def initial_peers(self) -> list[str]:
        return [self.peers[0].address]

    def connect(self, model: Path | str, **options: Any) -> Any:
        """The model, its blocks in this swarm; `options` as for `from_pretrained`."""
        options = {"initial_peers": self.initial_peers} | options
        return AutoDistributedModelForCausalLM.from_pretrained(str(model), **options)

    def launch(self, *argv: str, lie: str | None = None, cache: Path | None = None) -> Peer:
        """Start a command without waiting for it to be ready; `lie`, `cache`: see `ForkServer.start`."""
        stem = self._folder / f"peer{len(self.peers)}"
        out, err = stem.with_suffix(".out"), stem.with_suffix(".err")
        peer = Peer(self._server.start(argv, out, err, lie=lie, home=self.home, cache=cache), out, err)
        self.peers.append(peer)
        return peer

    def serve(self, model: Path | str, *spans: str, options: Sequence[str] = (), lie: str | None = None) -> list[Peer]:
        """Peers for `spans` ("0:2"), the first of which founds the swarm if nobody has; ready when this returns."""
        started: list[Peer] = []
        for span in spans:
            join = [part for peer in self.peers[:1] for part in ("--initial-peers", peer.address)]
            argv = ["serve", str(model), "--blocks", span, "--host", "127.0.0.1", "--threads", "1", *join, *options]
            started.append(self.launch(*argv, lie=lie))
            if len(self.peers) == 1:
                started[0].wait_ready()
        for peer in started:
            peer.wait_ready()
        return started

    def close(self) -> None:
        for peer in self.peers:
            with contextlib.suppress(ProcessLookupError):
                peer.send(signal.SIGCONT)
                peer.send(signal.SIGKILL)


@dataclass(frozen=True)
class Both:
    """Makes a model anew, plain and through the swarm that serves it."""

    path: Path
    swarm: Swarm

    def local(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.path)

    def remote(self) -> Any:
        return self.swarm.connect(self.path)


@contextlib.contextmanager
def new_swarm(server: ForkServer) -> Iterator[Swarm]:
    """A swarm without peers yet; all of its processes end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        swarm = Swarm(server, Path(folder))
        try:
            yield swarm
        finally:
            swarm.close()
