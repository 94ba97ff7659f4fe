"""Calls that run out of memory: they leave nothing behind, others give way to them, and the peer serves on."""

import asyncio
import gc
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.compute.failures import let_go
from peer.compute.scheduler import Priority
from peer.span.span import Span
from peer.training.kept import Graph
from peer.training.runner import Task, TrainingRunner
from peer.training.trainer import Trainer
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import OutOfMemory, TooLong, UnknownCall
from protocol.tensors import Limits
from tests.tools.desk import Desk
from tests.tools.fuzzing.carrier import connect
from tests.tools.fuzzing.handlers import Handlers
from tests.tools.scarce_memory import ScarceMemory
from tests.tools.spans import assert_same, states
from tests.tools.wire import context, forward

AMPLE = 10**9
TOKENS = 64


class Scarce:
    """A peer's whole service in this process, whose training calls have as little memory as `memory` says."""

    def __init__(self, handlers: Handlers):
        self.handlers, self.memory = handlers, ScarceMemory()
        self.trainer: Trainer = handlers._trainers[0]
        self.trainer.kept.max_bytes = self.trainer.max_bytes = AMPLE  # what is foreseen would protect it

    def run(self, runner: TrainingRunner, tasks: Sequence[Task]) -> list[Any]:
        with self.memory:
            return RUN(runner, tasks)

    def play(self, script: Callable[[Channel], Coroutine[Any, Any, None]]) -> None:
        """Run a client's script on a stream to the service."""

        async def play() -> None:
            near, far = connect("ann", "peer")
            served = asyncio.ensure_future(self.handlers._entrances[0].handle(far))
            channel = Channel(near, Limits(), 60)
            try:
                await channel.call(Message(self.handlers._hello))
                await script(channel)
            finally:
                channel.close()
                await served
            await self.handlers._scheduler.submit(Priority.CALL, lambda: None, "ann")
            assert not self.kept, "what is kept for a client that has gone is dropped"
            await self.check_taken()

        self.handlers._loop.run_until_complete(play())

    async def check_taken(self) -> None:
        """Nothing is held but what is kept for backwards, as soon as the threads have come to rest."""
        end = time.monotonic() + 2
        while self.memory.taken > self.kept * 1.01 and time.monotonic() < end:
            await asyncio.sleep(0.001)
        assert self.memory.taken <= self.kept * 1.01

    @property
    def kept(self) -> int:
        return sum(kept.size for kept in self.trainer.kept._kept.values())


RUN = TrainingRunner.run


@pytest.fixture(scope="module")
def handlers(models: Callable[[str], Path]) -> Iterator[Handlers]:
    made = Handlers(models("llama"))
    yield made
    made.close()


@pytest.fixture
def scarce(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scarce]:
    made = Scarce(handlers)
    monkeypatch.setattr(TrainingRunner, "run", lambda runner, tasks: made.run(runner, tasks))
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


async def ask_forward(channel: Channel, rows: int, seed: int, keep: bool = True) -> Message:
    tensors = {"hidden_states": states(rows, TOKENS, seed)}
    return await channel.call(forward(tensors, keep=keep, training=True, dropout_seed=seed))


async def ask_backward(channel: Channel, rows: int, seed: int, call_id: int) -> Message:
    tensors = {"grad": states(rows, TOKENS, seed + 1)}
    if not call_id:
        tensors["hidden_states"] = states(rows, TOKENS, seed)
    body = pb.Backward(context=context(training=True, dropout_seed=seed), call_id=call_id)
    return await channel.call(Message(body, tensors))


class _Fails(torch.autograd.Function):
    """A product whose gradient does not fit."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
        return states.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError


def test_a_backward_that_fails_leaves_no_queue() -> None:
    """What autograd had yet to do, on the other way through the graph, would wait for the thread's next backward."""
    memory, states = ScarceMemory(), torch.zeros(1, 8, 1000, requires_grad=True)
    gc.disable()
    with memory:
        result = torch.cat([states * 2, _Fails.apply(states)])  # type: ignore[no-untyped-call]
        graph = Graph({"hidden_states": states}, result, 0, 0, "", False)
        with pytest.raises(torch.OutOfMemoryError):
            graph.backward(torch.ones(2, 8, 1000))
        del graph, result
    gc.enable()
    assert memory.taken == 0


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_call_that_fails_leaves_nothing(scarce: Scarce, kind: str, share: float) -> None:
    """Not even until the garbage collector comes, nor until the next backward."""
    memory = scarce.memory

    async def ask(channel: Channel) -> None:
        await (ask_forward(channel, 8, 1) if kind == "forward" else ask_backward(channel, 8, 1, 0))

    async def play(channel: Channel) -> None:
        await ask(channel)
        scarce.trainer.kept.forget("ann")
        await scarce.check_taken()
        memory.limit = memory.peak * share
        with pytest.raises(OutOfMemory, match="send fewer tokens at once"):
            await ask(channel)
        assert not scarce.kept
        await scarce.check_taken()

    scarce.play(play)


@pytest.mark.parametrize("more", [1.01, 1.03])
def test_the_backward_of_what_was_kept_fails(scarce: Scarce, more: float) -> None:
    """The client is asked for the forward's inputs, as after any activations that are gone."""
    memory = scarce.memory

    async def play(channel: Channel) -> None:
        kept = (await ask_forward(channel, 8, 1)).body.call_id
        memory.limit = memory.taken * more
        with pytest.raises(UnknownCall, match="no memory for the backward"):
            await ask_backward(channel, 8, 1, kept)
        assert not scarce.kept
        await scarce.check_taken()
        await ask_backward(channel, 8, 1, 0)

    scarce.play(play)


def test_the_oldest_that_is_kept_gives_way(scarce: Scarce) -> None:
    memory = scarce.memory

    async def play(channel: Channel) -> None:
        expected = (await ask_backward(channel, 8, 3, 0)).tensors
        first, second = [(await ask_forward(channel, 8, seed)).body.call_id for seed in (1, 2)]
        memory.limit, memory.peak = memory.taken * 1.05, 0
        found = (await ask_backward(channel, 8, 3, 0)).tensors
        assert memory.refused == 1
        assert torch.equal(found["grad.hidden_states"], expected["grad.hidden_states"])
        with pytest.raises(UnknownCall):
            await ask_backward(channel, 8, 1, first)
        await ask_backward(channel, 8, 2, second)
        assert not scarce.kept
        await scarce.check_taken()

    scarce.play(play)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("others_give_way", [True, False])
def test_steps_that_do_not_fit(spans: Callable[..., Span], count: int, others_give_way: bool) -> None:
    """Are tried once more when others have given way; else their sessions are lost, and nothing is held."""
    desk, memory, others = Desk(spans("llama")), ScarceMemory(), list[torch.Tensor]()

    def talk() -> list[Any]:
        """Sessions that have begun, with one step more each."""
        talks = [desk.open() for _ in range(count)]
        desk.run(*(desk.step(talk, states(2, 3, 9)) for talk in talks))
        return [desk.step(talk, states(2, 50 + number, number)) for number, talk in enumerate(talks)]

    with memory:
        expected, steps = desk.each(*talk()), talk()
        others.append(torch.zeros(10**6))
        memory.limit = before = memory.taken
        if others_give_way:
            desk.runner._make_room = others.clear
        gc.collect()
        gc.disable()
        outcomes = desk.run(*steps)
        refused, memory.limit = memory.refused, inf
        let_go(*(outcome for outcome in outcomes if isinstance(outcome, Exception)))
        if others_give_way:
            assert_same(outcomes, expected)
            assert [step.session.cache.seen for step in steps] == [53 + number for number in range(count)]
        else:
            assert all(isinstance(outcome, torch.OutOfMemoryError) for outcome in outcomes)
            assert all(step.session.lost for step in steps)
            assert memory.taken == before
        gc.enable()
    assert refused


def test_many_calls_against_a_tight_limit(scarce: Scarce) -> None:
    """Of random sizes: each is answered rightly or refused with a typed error, and nothing leaks."""
    memory, chance = scarce.memory, random.Random(5)
    answered, refused = 0, 0

    async def play(channel: Channel) -> None:
        nonlocal answered, refused
        rows = (1, 4, 9, 24)
        expected = {count: (await ask_backward(channel, count, 1, 0)).tensors for count in rows}
        memory.limit = memory.peak * 0.3
        for _ in range(60):
            count = chance.choice(rows)
            try:
                kept = (await ask_forward(channel, count, 1)).body.call_id if chance.random() < 0.7 else 0
                if chance.random() < 0.5:
                    found = (await ask_backward(channel, count, 1, kept)).tensors
                    assert torch.equal(found["grad.hidden_states"], expected[count]["grad.hidden_states"])
                    answered += 1
            except (OutOfMemory, UnknownCall, TooLong):  # any other ends the test
                refused += 1
            await scarce.check_taken()

    scarce.play(play)
    assert min(answered, refused) > 5
