"""Peers killed and stopped all the time, while clients generate and train: every token and every loss must be those of
an undisturbed run on one machine:

python -m benchmarks.chaos --minutes 15 --seed 1

Five peers hold every block three times. Every 2 s one is killed with -9 or stopped (and continued later), and what was
killed is started again, as itself or as a stranger. In a run of over a minute, now and then, the bootstrap node is
killed and comes back under its identity and port, all holders of a block are killed at once, and two peers are cut off
together with their p2pd.

With --scarce-memory the peers compute on the pretended GPU, which has next to no memory for one call in ten.

With --private each of them is a machine of its own on one network, and so are the clients: members of a private swarm
that find each other. One has the model's folder, and the others fetch what they need from each other. Strangers are
machines that have just been let in, and have nothing. Linux only, as root.
"""

import argparse
import contextlib
import faulthandler
import itertools
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
import transformers

from benchmarks.loads import KINDS, Talk, train, with_lora
from bootstrap.membership.folder import SwarmFolder
from client import AutoDistributedModelForCausalLM
from client.swarm.loop import LOOP
from protocol.membership.certificate import Role
from protocol.model.loading import LOADING
from protocol.name import CACHE_VARIABLE
from tests.tools.families import build_family
from tests.tools.namespaces import Host, Networks, enter, open_networks, why_not
from tests.tools.swarm import ForkServer, Peer
from tests.tools.swarms import found, home, let_in

SPANS = ("0:2", "0:3", "2:5", "3:5", "0:5")
BLOCKS = range(5)
PERIOD = 2.0
"""Seconds between two blows."""
LOSS_TOLERANCE = 1e-5
STEPS = 12
_OPTIONS = ("--threads", "1", "--cache-tokens", "20000")
_LOCALHOST = ("--host", "127.0.0.1")
_NOBODY = ("None of the initial peers answers", "No member of the swarm answers any more")
_DEADLINE = 120.0
"""Seconds that clients get to end what they are doing when the chaos is over."""


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


@dataclass
class Report:
    """What was done to the swarm, and what the clients saw."""

    blows: Counter[str] = field(default_factory=Counter)
    generations: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    losses: int = 0
    worst_loss: float = 0.0
    longest_pause: float = 0.0
    longest_step: float = 0.0
    problems: list[str] = field(default_factory=list)

    def print(self) -> None:
        """As a Markdown table."""
        print("| what | how much |\n|---|---|")
        for name, count in sorted(self.blows.items()):
            print(f"| {name} | {count} |")
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.generations.items()))
        print(f"| generations | {kinds} |\n| tokens compared | {self.tokens} |")
        print(f"| losses compared | {self.losses} (largest difference {self.worst_loss:.1e}) |")
        print(f"| longest pause before a token | {self.longest_pause:.1f} s |")
        print(f"| longest training step | {self.longest_step:.1f} s |")
        print(f"| mismatches and errors | {len(self.problems)} |")
        for problem in self.problems:
            print(f"\n{problem}")


class Chaos:
    """Strikes the posts until it is told to end. `hard` blows are those that cost every holder of a block, or more."""

    def __init__(self, bootstrap: Post, posts: list[Post], seed: int, hard: bool, report: Report):
        self._bootstrap, self._posts, self._report = bootstrap, posts, report
        self._chance = random.Random(seed)
        self._comes_back = 0.0
        cycle = ["bootstrap", "blackout", "partition"]
        self._hard = itertools.cycle(cycle) if hard else None

    def run(self, done: threading.Event) -> None:
        """Strike every `PERIOD`. What goes wrong here is a problem of the run: without blows it would prove nothing."""
        try:
            self._strike_on(done)
        except Exception as error:
            self._report.problems.append(f"The chaos ended early: {error!r}")

    def _strike_on(self, done: threading.Event) -> None:
        blow_at, hard_at = time.monotonic(), time.monotonic() + 20
        while not done.wait(0.05):
            self._tend()
            now = time.monotonic()
            if now > blow_at:
                blow_at = now + PERIOD
                if self._hard is not None and now > hard_at:
                    hard_at = now + 30
                    self._strike_hard(next(self._hard))
                else:
                    self._strike()

    def _tend(self) -> None:
        for post in (self._bootstrap, *self._posts):
            post.tend()
        if self._bootstrap.is_down and time.monotonic() > self._comes_back:
            self._bootstrap.start([])
        members = [post.address for post in (self._bootstrap, *self._posts) if post.is_ready and not post.is_stopped]
        for post in self._posts:
            if post.is_down and members:
                post.start(members, as_stranger=self._chance.random() < 0.3)
                self._note("started again")

    def _strike(self) -> None:
        candidates = [post for post in self._able() if self._can_spare(post)]
        if not candidates:
            self._note("blows held back, as a block had one holder left")
            return
        victim, kind = self._chance.choice(candidates), self._chance.choice(["kill", "kill", "kill", "stop", "freeze"])
        if kind == "kill":
            self._note("killed")
            victim.kill()
        else:
            self._note("stopped" if kind == "stop" else "stopped with p2pd")
            victim.freeze(self._chance.uniform(3, 9), wholly=kind == "freeze")

    def _strike_hard(self, kind: str) -> None:
        able = self._able()
        if kind == "bootstrap" and self._bootstrap.is_ready:
            self._note("bootstrap node killed")
            self._bootstrap.kill()
            self._comes_back = time.monotonic() + 5
        elif kind == "blackout":
            block = self._chance.choice(BLOCKS)
            self._note("all holders of a block killed at once")
            for post in able:
                if block in post.blocks:
                    post.kill()
        elif len(able) > 2:
            self._note("two peers cut off for 20 s")
            for post in self._chance.sample(able, 2):
                post.freeze(20, wholly=True)

    def _able(self) -> list[Post]:
        return [post for post in self._posts if post.is_ready and not post.is_stopped]

    def _can_spare(self, victim: Post) -> bool:
        held = {block for post in self._able() if post is not victim for block in post.blocks}
        return held.issuperset(BLOCKS)

    def _note(self, what: str) -> None:
        self._report.blows[what] += 1


class Clients:
    """Two that generate and one that trains, each in a thread; all they see goes into the report."""

    def __init__(self, model: Path, remote: str, options: dict[str, Any], report: Report):
        """`remote`, `options`: what the swarm calls `model`, and how to join, as for `from_pretrained`."""
        self._model, self._remote, self._options, self._report = model, remote, options, report
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, done: threading.Event, seed: int, length: int) -> None:
        """Begin; they end after what they are doing when `done` is set."""
        works: list[Callable[[], Iterator[None]]] = [
            lambda: self._generate(seed, length, adapted=False),
            lambda: self._generate(seed + 500_000, length, adapted=True),
            lambda: self._train(seed),
        ]
        for work in works:
            self._threads.append(threading.Thread(target=self._insist, args=(work, done), daemon=True))
            self._threads[-1].start()

    def join(self) -> None:
        """Wait for them; a client that hangs is a problem, and where it hangs is printed."""
        end = time.monotonic() + _DEADLINE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                faulthandler.dump_traceback()
                self._report.problems.append(f"A client hangs: {thread.name}.")

    def _insist(self, work: Callable[[], Iterator[None]], done: threading.Event) -> None:
        while not done.is_set():
            try:
                for _ in work():
                    if done.is_set():
                        return
            except Exception as error:
                with self._lock:
                    self._report.problems.append(f"{type(error).__name__}: {error}")

    def connect(self) -> Any:
        """The swarm's model, made anew."""
        options = self._options | {"silence_timeout": 3.0, "micro_batch_tokens": 14}
        return AutoDistributedModelForCausalLM.from_pretrained(self._remote, **options)

    def _local(self) -> Any:
        with LOADING:
            return transformers.AutoModelForCausalLM.from_pretrained(self._model).eval()

    def _generate(self, first: int, length: int, adapted: bool) -> Iterator[None]:
        ours, theirs, assistant = self.connect(), self._local(), self._local()
        if adapted:
            ours, theirs = with_lora(ours).eval(), with_lora(theirs).eval()
        for seed, kind in enumerate(itertools.cycle(KINDS), first):
            talk = Talk(kind, seed, length)
            said = talk.say(ours, assistant)
            expected = Talk(kind, seed, length).say(theirs, assistant)
            self._compare_tokens(talk, adapted, said, expected)
            yield

    def _compare_tokens(self, talk: Talk, adapted: bool, said: torch.Tensor, expected: torch.Tensor) -> None:
        with self._lock:
            report = self._report
            report.generations[talk.kind] += 1
            report.tokens += expected.numel()
            report.longest_pause = max(report.longest_pause, talk.watch.longest)
            if not torch.equal(said, expected):
                report.problems.append(f"{talk}, adapter {adapted}: {said.tolist()} instead of {expected.tolist()}")

    def _train(self, first: int) -> Iterator[None]:
        for seed in itertools.count(first):
            expected = train(with_lora(self._local(), seed), seed, STEPS)
            found = train(with_lora(self.connect(), seed), seed, STEPS, self._note_step)
            self._compare_losses(seed, found, expected)
            yield

    def _note_step(self, seconds: float) -> None:
        with self._lock:
            self._report.longest_step = max(self._report.longest_step, seconds)

    def _compare_losses(self, seed: int, found: list[float], expected: list[float]) -> None:
        differences = [abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True)]
        with self._lock:
            self._report.losses += len(found)
            self._report.worst_loss = max(self._report.worst_loss, *differences)
            if max(differences) > LOSS_TOLERANCE:
                self._report.problems.append(f"losses of run {seed}: {found} instead of {expected}")


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

    bootstrap = make("bootstrap", "bootstrap", "--port", str(_free_port()))
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


def run_chaos(
    server: ForkServer,
    model: Path,
    seconds: float,
    seed: int,
    hard: bool,
    length: int = 40,
    scarce_memory: bool = False,
    networks: Networks | None = None,
) -> Report:
    """So many seconds of chaos on the 5 blocks of `model`; with `networks` in a private swarm on one of them."""
    report, over, done = Report(), threading.Event(), threading.Event()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if networks is None:
            stage = open_stage(server, folder, model, scarce_memory)
        else:
            stage = stack.enter_context(private_stage(server, folder, model, networks))
        stack.enter_context(stage.running())
        bootstrap, posts = stage.bootstrap, stage.posts
        way_in = {"initial_peers": [bootstrap.address]} if networks is None else {"swarm": "lab"}
        clients = Clients(model, stage.remote, way_in, report)
        chaos = Chaos(bootstrap, posts, seed, hard, report)
        striker = threading.Thread(target=chaos.run, args=(over,))
        if not hard:
            clients.connect()  # a first look-up and fetch among stopped members is more than a short run has time for
        clients.start(done, seed * 1_000_000, length)
        striker.start()
        try:
            over.wait(seconds)
            done.set()
            clients.join()
        finally:
            done.set()
            over.set()
            striker.join()
        for post in (bootstrap, *posts):
            report.problems += [f"A peer died by itself: {fault}" for fault in post.faults]
            report.blows["starts while all known members were down"] += post.lonely_starts
            report.blows["calls refused for lack of memory"] += post.count("was refused: CUDA out of memory")
    return report


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=1)
    swarm = parser.add_mutually_exclusive_group()
    swarm.add_argument("--scarce-memory", action="store_true")
    swarm.add_argument("--private", action="store_true")
    options = parser.parse_args()
    if options.private and (reason := why_not()):
        parser.error(reason)
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, open_networks() as networks:
        server = ForkServer(pretended_gpu=options.scarce_memory)
        try:
            model = build_family("llama", Path(folder))
            seconds, is_long = 60 * options.minutes, options.minutes > 1
            report = run_chaos(
                server, model, seconds, options.seed, is_long,
                scarce_memory=options.scarce_memory, networks=networks if options.private else None,
            )  # fmt: skip
        finally:
            server.close()
    print(f"### Chaos, {options.minutes:g} minutes, seed {options.seed}\n")
    report.print()
    raise SystemExit(bool(report.problems))


if __name__ == "__main__":
    main()
