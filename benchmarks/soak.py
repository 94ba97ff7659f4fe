"""Mixed load on three peers for a long time: do memory, file descriptors and threads stay as they are?

python -m benchmarks.soak --minutes 60

The load comes in rounds. After each all clients go, and when the swarm has come to rest every process is measured: its
anonymous memory, file descriptors and threads, of this process (the clients') also asyncio tasks and Python objects.
The rounds after the first (the warm-up) are compared: the mean of the first third with that of the last.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import random
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from benchmarks.loads import KINDS, VOCABULARY, Talk, train, with_lora
from client import AutoDistributedModelForCausalLM
from client.requests.work import Work
from client.swarm.loop import LOOP
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import SwarmError
from protocol.model.loading import LOADING
from tests.tools.families import build_family
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm

SPANS = ("0:5", "0:2", "2:5")
LINGER = 60.0
"""Seconds within which an unused membership and its p2pd must be gone."""
REST = 11.0
"""Seconds until what peers kept for it is gone as well: a peer gives memory back when it has been at rest for 10 s."""
FIGURES = ("MiB", "fds", "threads")


class Dropped(Exception):
    """A user has enough of a generation."""


class _DropAt(LogitsProcessor):
    def __init__(self, length: int):
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self._length:
            raise Dropped
        return scores


@dataclass
class Guest:
    """A client for one round: it comes, does one kind of thing again and again, and goes."""

    path: Path
    initial_peers: list[str]
    chance: random.Random

    def connect(self) -> Any:
        """A model of its own."""
        options: dict[str, Any] = {"initial_peers": self.initial_peers, "micro_batch_tokens": 14}
        return AutoDistributedModelForCausalLM.from_pretrained(str(self.path), **options)

    def talk(self) -> Iterator[str]:
        """Generations of all kinds and many lengths."""
        model = self.connect()
        with LOADING:
            assistant = transformers.AutoModelForCausalLM.from_pretrained(self.path).eval()
        while True:
            kind = self.chance.choice(list(KINDS))
            Talk(kind, self.chance.randrange(10**6), self.chance.randint(1, 60)).say(model, assistant)
            yield kind

    def drop(self) -> Iterator[str]:
        """Generations that end in the middle, and calls that are cancelled, as Ctrl-C does it."""
        model = with_lora(self.connect()).eval()
        while True:
            cache = DynamicCache(config=model.config)
            ids = torch.randint(3, VOCABULARY, (2, 10))
            stop = LogitsProcessorList([_DropAt(10 + self.chance.randint(1, 20))])
            with contextlib.suppress(Dropped):
                model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=40, logits_processor=stop)
            yield "dropped generations"
            hidden = torch.randn(4, 14, model.config.hidden_size)
            call = model.swarm.blocks.training.forward(Work(), range(5), hidden, keep=True)
            future = asyncio.run_coroutine_threadsafe(call, LOOP._running())
            time.sleep(self.chance.uniform(0, 0.02))
            future.cancel()
            yield "cancelled calls"

    def learn(self) -> Iterator[str]:
        """Training of one adapter after another, and evaluation; every adapter with a new client."""
        while True:
            model = with_lora(self.connect(), self.chance.randrange(100), self.chance.choice([2, 4, 8]))
            train(model, self.chance.randrange(100), 4)
            yield "training runs of 4 steps"
            ids = torch.randint(3, VOCABULARY, (4, 14))
            with torch.no_grad():
                model.eval()(input_ids=ids, labels=ids)
            yield "evaluations"

    def err(self) -> Iterator[str]:
        """Requests that a peer must refuse, and bytes that are no request."""
        model = self.connect()
        hop = model.swarm.route()[0]
        bad = [
            Message(pb.Step(context=pb.Context(start=0, end=5), number=1), {"hidden_states": torch.zeros(1, 1, 32)}),
            Message(pb.Forward(context=pb.Context(start=0, end=99)), {"hidden_states": torch.zeros(1, 1, 32)}),
            Message(pb.Forward(context=pb.Context(start=0, end=1)), {"hidden_states": torch.zeros(1, 2, 5)}),
            Message(
                pb.Forward(context=pb.Context(start=0, end=1, adapter=b"x" * 32)), {"hidden_states": torch.zeros(1)}
            ),
            Message(pb.OpenSession(start=0, end=1, fork_of=b"none")),
        ]
        while True:
            LOOP.run(_ask_badly(model.swarm.network, hop.peer.peer_id, self.chance.choice(bad)))
            yield "refused requests"
            time.sleep(0.01)


async def _ask_badly(swarm: Any, peer_id: str, message: Message) -> None:
    channel = await swarm.connections.open(peer_id)
    try:
        with contextlib.suppress(SwarmError):
            await channel.call(message)
            raise AssertionError("a peer took a request that it must refuse")
        with contextlib.suppress(SwarmError):
            await channel.stream.send(os.urandom(64), patience=5)
            await channel.receive_answer()
    finally:
        channel.close()


@dataclass
class Soak:
    """Rounds of load on a swarm, and what was measured after each."""

    path: Path
    swarm: Swarm
    seed: int = 1
    done: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, float]] = field(default_factory=list)
    problems: list[BaseException] = field(default_factory=list)

    def run_round(self, seconds: float, rest: float = REST) -> None:
        """Load for so long, then rest, then a sample."""
        others = _own_p2pds()
        self._load(seconds)
        gc.collect()
        deadline = time.monotonic() + LINGER
        while _own_p2pds() - others:
            assert time.monotonic() < deadline, "clients that are gone have left their p2pd behind"
            time.sleep(0.1)
        time.sleep(rest)
        gc.collect()
        self.samples.append(self._measure())

    def _load(self, seconds: float) -> None:
        over = threading.Event()
        number = len(self.samples)
        first = self.swarm.peers[number % len(self.swarm.peers)]
        guests = [
            Guest(self.path, [peer.address], random.Random(self.seed * 1000 + number * 10 + i))
            for i, peer in enumerate([first, first, *self.swarm.peers])
        ]
        works = [guests[0].talk(), guests[1].drop(), guests[2].learn(), guests[3].err(), guests[4].talk()]
        threads = [threading.Thread(target=self._insist, args=(work, over)) for work in works]
        del works
        for thread in threads:
            thread.start()
        over.wait(seconds)
        over.set()
        for thread in threads:
            thread.join()

    def _insist(self, work: Iterator[str], over: threading.Event) -> None:
        try:
            for name in work:
                self.done[name] += 1
                if over.is_set():
                    break
        except BaseException as error:
            self.problems.append(error)

    def _measure(self) -> dict[str, float]:
        sample: dict[str, float] = {}
        for number, peer in enumerate(self.swarm.peers):
            sample |= figures_of(f"peer {number}", peer)
            for child in psutil.Process(peer.pid).children():
                sample |= figures_of(f"p2pd of peer {number}", Peer(child.pid, peer.stdout, peer.stderr))
        sample |= figures_of("clients", Peer(os.getpid(), Path(), Path()))
        sample["clients: tasks"] = len(asyncio.all_tasks(LOOP._running()))
        sample["clients: objects"] = len(gc.get_objects())
        return sample


def _own_p2pds() -> set[int]:
    """The process IDs of this process's own memberships."""
    found = psutil.process_iter(["ppid", "name"])
    return {one.pid for one in found if one.info["ppid"] == os.getpid() and one.info["name"] == "p2pd"}


def figures_of(name: str, process: Peer) -> dict[str, float]:
    folder = Path(f"/proc/{process.pid}")
    threads = re.search(r"^Threads:\s+(\d+)", (folder / "status").read_text(), re.M)
    assert threads
    values = (process.rss() / 2**20, len(list((folder / "fd").iterdir())), int(threads[1]))
    return {f"{name}: {figure}": float(value) for figure, value in zip(FIGURES, values, strict=True)}


@contextlib.contextmanager
def soaking(server: ForkServer, path: Path) -> Iterator[Soak]:
    """Three peers over the 5 blocks of the model `path`."""
    with new_swarm(server) as swarm:
        swarm.serve(path, *SPANS, options=("--cache-tokens", "20000"))
        yield Soak(path, swarm)


def growth(samples: list[dict[str, float]], name: str) -> tuple[float, float, float]:
    """Means of the first and the last third, and the standard error of their difference."""
    values = [sample[name] for sample in samples]
    count = max(len(values) // 3, 1)
    first, last = values[:count], values[-count:]
    error = 0.0
    if count > 1:
        error = ((statistics.variance(first) + statistics.variance(last)) / count) ** 0.5
    return statistics.mean(first), statistics.mean(last), error


def print_table(soak: Soak) -> None:
    """A Markdown table of every figure."""
    print("| figure | first third | last third | change | standard error |\n|---|---|---|---|---|")
    for name in soak.samples[-1]:
        first, last, error = growth(soak.samples[1:], name)
        whole = first or 1.0
        print(f"| {name} | {first:.1f} | {last:.1f} | {(last - first) / whole:+.1%} | {error / whole:.1%} |")
    print("\nDone:", ", ".join(f"{count} {name}" for name, count in sorted(soak.done.items())) + ".")


def _run(minutes: float, seconds: float, report: Callable[[Soak], None]) -> bool:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = ForkServer()
        stack.callback(server.close)
        end = time.monotonic() + 60 * minutes
        with soaking(server, build_family("llama", Path(folder))) as soak:
            while time.monotonic() < end and not soak.problems:
                soak.run_round(seconds)
            report(soak)
            for problem in soak.problems:
                print(f"\n{type(problem).__name__}: {problem}")
            return bool(soak.problems)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--round", type=float, default=25, help="seconds of load in each round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"### Soak, {options.minutes:g} minutes\n")
    raise SystemExit(_run(options.minutes, options.round, print_table))


if __name__ == "__main__":
    main()
