"""The way of a step: how many of our own functions run, and in how many files, for one trip through two peers.

python -m benchmarks.trace                      (this tree)
python benchmarks/trace.py --tree FOLDER        (another checkout, whatever its modules are called)

Prints a Markdown table. "Own calls" are entries into functions of the product, where going on with a generator or a
coroutine counts as one; "file changes" are those that are in another file than the entry before. Medians over several
equal trips, so what happens now and then in the background does not show.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_ROOMS = ("protocol", "bootstrap", "peer", "client")
_TRIPS, _WARM_UP = 9, 3
_REST = 0.02
"""Seconds for what a peer does after its answer."""
_NEVER = 1e9
"""Seconds of round trip from which on peers hand results on to each other: how fast the machine is would decide it."""
_ROWS, _TOKENS = 2, 16
_READY = re.compile(r"^ready address=(\S+)", re.M)


@dataclass
class Counts:
    """What ran since it was asked last."""

    calls: Counter[str] = field(default_factory=Counter)
    """By file."""
    changes: int = 0


class Tracer:
    """Counts from the moment on that it is made, in this thread and in those that start later."""

    def __init__(self, tree: Path):
        self._inside = {f"{tree / room}{os.sep}": room for room in _ROOMS}
        self._files: dict[str, str] = {}
        self._counts, self._last = Counts(), ""
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def take(self) -> Counts:
        """The counts since the last question."""
        counts, self._counts, self._last = self._counts, Counts(), ""
        return counts

    def _note(self, frame: Any, event: str, _argument: object) -> None:
        if event != "call":
            return
        path = frame.f_code.co_filename
        file = self._files.get(path)
        if file is None:
            self._files[path] = file = self._name(path)
        if file:
            self._counts.calls[file] += 1
            self._counts.changes += file != self._last
            self._last = file

    def _name(self, path: str) -> str:
        """A file of the product by its path in the tree; "" for any other."""
        room = next((room for folder, room in self._inside.items() if path.startswith(folder)), "")
        return path[path.rindex(f"{os.sep}{room}{os.sep}") + 1 :].removesuffix(".py") if room else ""


def _serve(tree: Path, arguments: list[str], output: Path, questions: Connection) -> None:
    """The process of a traced peer: the `peer` command itself."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT, 0o600), 1)
    sys.path.insert(0, str(tree))
    sys.argv = ["peer", *arguments]
    script: str = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["peer"]
    module, _, function = script.partition(":")
    main = getattr(importlib.import_module(module), function)
    tracer = Tracer(tree)

    def answer() -> None:
        sys.setprofile(None)
        while True:
            questions.recv()
            questions.send(tracer.take())

    threading.Thread(target=answer, daemon=True).start()
    main()


class Peer:
    """A traced peer of its own process."""

    def __init__(self, tree: Path, folder: Path, arguments: list[str]):
        self._questions, theirs = multiprocessing.Pipe()
        self._output = folder / f"{time.monotonic_ns()}.out"
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(tree, arguments, self._output, theirs))
        self._process.start()

    def address(self) -> str:
        """Its address, once it is ready."""
        while self._process.is_alive():
            if self._output.exists() and (match := _READY.search(self._output.read_text())):
                return match[1]
            time.sleep(0.05)
        raise RuntimeError("A peer ended before it was ready.")

    def take(self) -> Counts:
        """See `Tracer.take`."""
        self._questions.send(None)
        counts = self._questions.recv()
        assert isinstance(counts, Counts)
        return counts

    def end(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.join()


@contextmanager
def _peers(tree: Path, folder: Path, model: Path) -> Iterator[tuple[list[Peer], str]]:
    """Two peers with two blocks each, and the first one's address."""
    peers: list[Peer] = []
    try:
        common = ["serve", str(model), "--host", "127.0.0.1", "--threads", "1", "--blocks"]
        peers.append(Peer(tree, folder, [*common, "0:2"]))
        first = peers[0].address()
        peers.append(Peer(tree, folder, [*common, "2:4", "--initial-peers", first]))
        peers[1].address()
        yield peers, first
    finally:
        for peer in peers:
            peer.end()


def _build(folder: Path) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return folder / "llama"


@dataclass(frozen=True)
class Trip:
    """What client and first peer did in equal trips."""

    name: str
    client: list[Counts]
    peer: list[Counts]


def _measure(names: list[str], run: Callable[[], list[Callable[[], object]]], tracer: Tracer, peer: Peer) -> list[Trip]:
    """Several times the trips that `run` makes anew, one after the other."""
    trips = [Trip(name, [], []) for name in names]
    for number in range(_WARM_UP + _TRIPS):
        for trip, go in zip(trips, run(), strict=True):
            tracer.take(), peer.take()
            go()
            mine = tracer.take()
            time.sleep(_REST)
            theirs = peer.take()
            if number >= _WARM_UP:
                trip.client.append(mine)
                trip.peer.append(theirs)
    return trips


def _decoding(model: Any) -> Callable[[], list[Callable[[], object]]]:
    import torch
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    token = torch.ones(1, 1, dtype=torch.long)

    @torch.no_grad()
    def step() -> None:
        model(token, past_key_values=cache)

    return lambda: [step]


def _training(model: Any) -> Callable[[], list[Callable[[], object]]]:
    import peft
    import torch

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).train()
    ids = torch.randint(3, 128, (_ROWS, _TOKENS))
    weights = [parameter for parameter in tuned.parameters() if parameter.requires_grad]

    def prepare() -> list[Callable[[], object]]:
        with torch.no_grad():
            for weight in weights:
                weight.add_(1e-3)  # as an optimizer does: the peers hold another adapter
        losses: list[Any] = []
        return [lambda: losses.append(tuned(ids, labels=ids).loss), lambda: losses[0].backward()]

    return prepare


def _row(trip: Trip, end: str, of_trips: list[Counts]) -> str:
    middle = sorted(of_trips, key=lambda counts: counts.calls.total())[len(of_trips) // 2]
    calls = statistics.median(counts.calls.total() for counts in of_trips)
    changes = statistics.median(counts.changes for counts in of_trips)
    often = ", ".join(f"{file} {count}" for file, count in middle.calls.most_common(5))
    return f"| {trip.name}, {end} | {calls:.0f} | {len(middle.calls)} | {changes:.0f} | {often} |"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the checkout that is measured")
    parser.add_argument("--whole", action="store_true", help="every file of the client's trips, too")
    options = parser.parse_args()
    tree = options.tree.resolve()
    sys.path.insert(0, str(tree))
    with tempfile.TemporaryDirectory() as folder:
        path = _build(Path(folder))
        with _peers(tree, Path(folder), path) as (peers, address):
            tracer = Tracer(tree)
            from client import AutoDistributedModelForCausalLM as Model

            trips = []
            for names, kind in ((["decode step"], _decoding), (["LoRA forward", "LoRA backward"], _training)):
                model = Model.from_pretrained(str(path), initial_peers=[address], hand_over_above=_NEVER)
                trips += _measure(names, kind(model), tracer, peers[0])
            sys.setprofile(None)
    print("| trip | own calls | files | file changes | most visited |\n|---|---|---|---|---|")
    for trip in trips:
        print(_row(trip, "client", trip.client))
        print(_row(trip, "one peer", trip.peer))
    if options.whole:
        for trip in trips:
            print(f"\n{trip.name}: {dict(trip.client[-1].calls.most_common())}")


if __name__ == "__main__":
    main()
