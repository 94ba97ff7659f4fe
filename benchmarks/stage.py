"""Where chaos happens: posts, which are commands that are killed and run again, in an open or a private swarm."""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import psutil

from bootstrap.membership.folder import SwarmFolder
from client.swarm.loop import LOOP
from protocol.membership.certificate import Role
from protocol.name import CACHE_VARIABLE
from tests.tools.delay import free_ports
from tests.tools.namespaces import Host, Networks, enter
from tests.tools.swarm import ForkServer, Peer
from tests.tools.swarms import found, home, let_in

SPANS = ("0:2", "0:3", "2:5", "3:5", "0:5")
BLOCKS = range(5)
_OPTIONS = ("--threads", "1", "--cache-tokens", "20000")
_LOCALHOST = ("--host", "127.0.0.1")
_NOBODY = ("None of the initial peers answers", "No member of the swarm answers any more")


class Post:
    """A place in the swarm: a command that is run, killed and run again. Used by one thread."""

    def __init__(self, server: ForkServer, folder: Path, *command: str, lie: str | None = None):
        self._server, self._folder, self._command, self._lie = server, folder, command, lie
        self._numbers = itertools.count()
        self._frozen: list[psutil.Process] = []
        self._thaw_at = 0.0
        self._peer: Peer | None = None
        self.is_ready = False
        self.faults: list[str] = []
        """What it died of when nobody had killed it."""
        self.lonely_starts = 0
        """Starts that failed since all the members that it was told of had been killed or stopped meanwhile."""

    @property
    def blocks(self) -> range:
        """What it serves."""
        return self._running.blocks

    @property
    def address(self) -> str:
        """Where the others find it."""
        return self._running.address

    @property
    def is_stopped(self) -> bool:
        """Whether it is frozen now."""
        return bool(self._frozen)

    def start(self, initial_peers: list[str], as_stranger: bool = False) -> None:
        """Run the command, with a new identity if it comes as a stranger; `tend` notices when it is ready."""
        identity = self._folder / "identity"
        if as_stranger:
            identity.unlink(missing_ok=True)
        join = [part for address in initial_peers for part in ("--initial-peers", address)]
        self._run(*_LOCALHOST, "--identity", str(identity), *join)

    def _run(self, *options: str, **machine: Path) -> None:
        """`machine`: as for `ForkServer.start`."""
        number = next(self._numbers)
        out, err = self._folder / f"{number}.out", self._folder / f"{number}.err"
        self._peer = Peer(self._server.start([*self._command, *options], out, err, lie=self._lie, **machine), out, err)

    def kill(self) -> None:
        """kill -9."""
        self._thaw()
        self._running.kill()
        self._peer, self.is_ready = None, False

    def freeze(self, seconds: float, wholly: bool) -> None:
        """Stop the process, and its p2pd if wholly, for so long."""
        process = psutil.Process(self._running.pid)
        self._frozen = [process, *(process.children() if wholly else [])]
        for each in self._frozen:
            each.suspend()
        self._thaw_at = time.monotonic() + seconds

    def tend(self) -> None:
        """Notice that it has got ready, or died by itself; continue it when its time has come."""
        if self._frozen and time.monotonic() > self._thaw_at:
            self._thaw()
        if self._peer is None:
            return
        if not self._peer.is_alive():
            self._note_fault(self._peer.stderr)
            self._peer, self.is_ready = None, False
        elif not self.is_ready and self._says_ready():
            self._peer.wait_ready()
            self.is_ready = True

    def wait_ready(self) -> None:
        """Start-up is over when this returns."""
        self._running.wait_ready()
        self.is_ready = True

    def count(self, text: str) -> int:
        """How often it has said so, in all of its runs."""
        return sum(said.read_text().count(text) for said in self._folder.glob("*.err"))

    @property
    def is_down(self) -> bool:
        """Whether it has been killed, or has died, and waits for its next start."""
        return self._peer is None

    def _note_fault(self, stderr: Path) -> None:
        said = stderr.read_text().strip() if stderr.exists() else ""
        if not self.is_ready and any(reason in said for reason in _NOBODY):
            self.lonely_starts += 1
        else:
            self.faults.append(said or "it died without a word")

    def _says_ready(self) -> bool:
        said = self._running.stdout
        return said.exists() and "ready address" in said.read_text()

    @property
    def _running(self) -> Peer:
        assert self._peer is not None
        return self._peer

    def _thaw(self) -> None:
        for each in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
        self._frozen = []


class Machine(Post):
    """A post on a machine of its own: a member of a private swarm, which is told nothing of the others."""

    def __init__(self, server: ForkServer, folder: Path, admin: SwarmFolder, host: Host, *command: str):
        super().__init__(server, folder, *command, "--swarm", admin.name)
        self._admin, self._host = admin, host
        self._home, self._cache = folder / "home", folder / "cache"

    def start(self, initial_peers: list[str], as_stranger: bool = False) -> None:
        """See `Post.start`; a stranger is a new member, and has nothing of the model."""
        if as_stranger:
            shutil.rmtree(self._home)
            shutil.rmtree(self._cache, ignore_errors=True)
        if not self._home.exists():
            let_in(self._admin, self._home, Role.SERVE)
        self._run(home=self._home, cache=self._cache, network=self._host.space.path)


@dataclass(frozen=True)
class Stage:
    """Where it happens, before anything runs."""

    bootstrap: Post
    posts: list[Post]
    """One for each of `SPANS`. The first has the model's folder."""
    remote: str
    """What clients call the model."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All processes end with the block."""
        first, *others = self.posts
        try:
            self.bootstrap.start([])
            self.bootstrap.wait_ready()
            first.start([self.bootstrap.address])
            first.wait_ready()
            for post in others:
                post.start([self.bootstrap.address])
            for post in others:
                post.wait_ready()
            yield
        finally:
            for post in (self.bootstrap, *self.posts):
                if not post.is_down:
                    post.kill()


def open_stage(server: ForkServer, folder: Path, model: Path, scarce_memory: bool) -> Stage:
    """An open swarm on loopback."""

    def make(name: str, *command: str, lie: str | None = None) -> Post:
        (folder / name).mkdir()
        return Post(server, folder / name, *command, lie=lie)

    bootstrap = make("bootstrap", "bootstrap", "--port", str(*free_ports(1)))
    options, lie = list(_OPTIONS), None
    if scarce_memory:
        options, lie = [*options, "--device", "cuda:0"], "lacks memory"
    posts = [make(f"p{i}", "serve", str(model), "--blocks", span, *options, lie=lie) for i, span in enumerate(SPANS)]
    return Stage(bootstrap, posts, str(model))


@contextlib.contextmanager
def private_stage(server: ForkServer, folder: Path, model: Path, networks: Networks) -> Iterator[Stage]:
    """A private swarm on a network, in which this process's clients are within the block."""
    lan, admin = networks.lan(), found(folder / "founder")

    def make(name: str, *command: str) -> Post:
        (folder / name).mkdir()
        return Machine(server, folder / name, admin, networks.host(name, lan), *command)

    places = [str(model), *[model.name] * (len(SPANS) - 1)]
    posts = [
        make(f"p{i}", "serve", place, "--blocks", span, *_OPTIONS)
        for i, (place, span) in enumerate(zip(places, SPANS, strict=True))
    ]
    let_in(admin, folder / "client")
    with (
        home(folder / "client"),
        patch.dict(os.environ, {CACHE_VARIABLE: str(folder / "client" / "cache")}),
        _clients_within(networks.host("client", lan)),
    ):
        yield Stage(make("bootstrap", "bootstrap"), posts, model.name)


@contextlib.contextmanager
def _clients_within(host: Host) -> Iterator[None]:
    """Within the block the thread that opens the clients' connections, and starts their p2pd, is on `host`."""

    async def move(network: str | Path) -> None:
        enter(network)

    LOOP.run(move(host.space.path))
    try:
        yield
    finally:
        LOOP.run(move("/proc/self/ns/net"))
