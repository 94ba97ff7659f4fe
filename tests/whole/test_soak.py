"""The short form of `benchmarks/soak.py`: what every process holds at rest does not grow from round to round."""

import asyncio
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loads import KINDS
from benchmarks.soak import REST, soaking
from client import AutoDistributedModelForCausalLM
from client.requests.work import Work
from client.swarm.loop import LOOP
from tests.tools.swarm import ForkServer, Swarm

SECONDS = 5
RESTS = (1.5, REST, REST)
"""Of each round; those of the rounds that are compared are full ones."""
FEW = 2
"""Threads and tasks that come and go by themselves; what leaks, leaks with every session or call."""
KEPT = 12
"""Connections that peers keep to each other, once a busy machine's round trips had results handed over."""
FRAGMENTED = 1.1
"""What the C library cannot give back of rounds that left nothing is 3 to 30 MiB of 380, now more and now less."""
ALL = {"dropped generations", "cancelled calls", "training runs of 4 steps", "evaluations", "refused requests"}


def test_nothing_grows(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    with soaking(fork_server, models("llama")) as soak:
        for rest in RESTS:
            soak.run_round(SECONDS, rest)
    assert not soak.problems
    assert set(soak.done) >= ALL
    assert set(soak.done) & set(KINDS)
    before, after = soak.samples[1], soak.samples[-1]
    grown = {name: (value, after[name]) for name, value in before.items() if after[name] > allowed(name, value)}
    assert not grown


def allowed(name: str, before: float) -> float:
    """How much a figure may be after the last round."""
    if name.endswith("fds"):
        return before + KEPT
    if name.endswith(("threads", "tasks")):
        return before + (8 if name.startswith("p2pd") else FEW)  # Go starts threads as it likes
    return before * (1.25 if name.startswith("p2pd") else FRAGMENTED)


def test_a_cancelled_call_is_silent(models: Callable[[str], Path], swarm: Swarm) -> None:
    """Of more micro-batches than may be in flight at once some have not begun when Ctrl-C comes."""
    swarm.serve(models("llama"), "0:5")
    options: dict[str, Any] = {"initial_peers": swarm.initial_peers, "micro_batch_tokens": 14}
    model = AutoDistributedModelForCausalLM.from_pretrained(str(models("llama")), **options)

    async def cancel_soon() -> None:
        work = model.swarm.blocks.training.forward(Work(), range(5), torch.randn(40, 14, 32), keep=True)
        task = asyncio.create_task(work)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LOOP.run(cancel_soon())
        gc.collect()
    assert not caught
