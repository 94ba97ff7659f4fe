"""The short form of `benchmarks/soak.py`: what every process holds at rest does not grow from round to round."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.loads import KINDS
from benchmarks.soak import soaking
from tests.swarm import ForkServer

ROUNDS, SECONDS = 4, 5
FEW = 2
"""File descriptors and threads that come and go by themselves; what leaks, leaks with every session or call."""
ALL = {"dropped generations", "cancelled calls", "training runs of 4 steps", "evaluations", "refused requests"}


def test_nothing_grows(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    with soaking(fork_server, models("llama")) as soak:
        for _ in range(ROUNDS):
            soak.run_round(SECONDS)
    assert not soak.problems
    assert set(soak.done) >= ALL
    assert set(soak.done) & set(KINDS)
    before, after = soak.samples[1], soak.samples[-1]
    grown = {name: (value, after[name]) for name, value in before.items() if after[name] > allowed(name, value)}
    assert not grown


def allowed(name: str, before: float) -> float:
    """How much a figure may be after the last round."""
    if name.endswith(("fds", "threads", "tasks")):
        return before + (8 if name.startswith("p2pd") else FEW)  # Go starts threads as it likes
    return before * (1.25 if name.startswith("p2pd") else 1.05)
