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
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.loads import KINDS, Talk, train, with_lora
from benchmarks.stage import BLOCKS, Post, open_stage, private_stage
from client import AutoDistributedModelForCausalLM
from protocol.model.loading import LOADING
from tests.tools.families import build_family
from tests.tools.namespaces import Networks, open_networks, why_not
from tests.tools.swarm import ForkServer

PERIOD = 2.0
"""Seconds between two blows."""
LOSS_TOLERANCE = 1e-5
STEPS = 12
_DEADLINE = 120.0
"""Seconds that clients get to end what they are doing when the chaos is over."""


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
