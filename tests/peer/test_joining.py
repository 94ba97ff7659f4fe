"""Many clients at once: a peer joins their steps, each gets what it would get alone, and nobody starves."""

import asyncio
import gc
import re
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
import transformers

from peer.compute.batching_window import BatchingWindow
from peer.compute.scheduler import Priority, Scheduler
from peer.start.memory import return_freed_memory
from protocol.errors import SwarmError
from tests.tools.swarm import Swarm
from tests.tools.threads import run_at_once
from tests.tools.wire import OPEN, Wire, forward, step

OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": None, "do_sample": False}


def prompts() -> list[dict[str, Any]]:
    """Of different lengths; one with padding, one with beams."""
    chance = torch.Generator().manual_seed(3)
    asked: list[dict[str, Any]] = [
        {"input_ids": torch.randint(3, 128, (1, tokens), generator=chance)} for tokens in (2, 9, 17, 30)
    ]
    padded = torch.randint(3, 128, (2, 8), generator=chance)
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    asked += [{"input_ids": padded, "attention_mask": mask}, {"input_ids": padded[:1], "num_beams": 3}]
    return [OPTIONS | {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs for inputs in asked]


def with_lora(model: Any, seed: int) -> Any:
    """Another adapter for each seed; none for every third."""
    if seed % 3 == 2:
        return model
    torch.manual_seed(seed)
    targets = ["query_key_value"] if model.config.model_type == "bloom" else ["q_proj", "v_proj"]
    options: dict[str, Any] = {"r": 4, "target_modules": targets, "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()


def steps_per_call(swarm: Swarm) -> float:
    """Of all peers, as they say when they leave."""
    steps = calls = 0
    for peer in swarm.peers:
        peer.stop()
        found = re.search(r"ran (\d+) steps of generations in (\d+) calls", peer.stderr.read_text())
        assert found
        steps, calls = steps + int(found[1]), calls + int(found[2])
    return steps / calls


@pytest.mark.parametrize(("family", "adapters"), [("llama", True), ("gemma2", False), ("bloom", True)])
def test_each_gets_what_it_would_get_alone(
    models: Callable[[str], Path], swarm: Swarm, family: str, adapters: bool
) -> None:
    path = models(family)
    swarm.serve(path, "0:5")

    def make(connect: Callable[[], Any], number: int) -> Any:
        return with_lora(connect(), number) if adapters else connect()

    local = transformers.AutoModelForCausalLM.from_pretrained
    expected = [make(lambda: local(path).eval(), i).generate(**inputs) for i, inputs in enumerate(prompts())]
    ours = [make(lambda: swarm.connect(path), i) for i, _ in enumerate(prompts())]
    said = run_at_once(*(partial(ours[i].generate, **inputs) for i, inputs in enumerate(prompts())))
    assert all(map(torch.equal, said, expected))
    assert steps_per_call(swarm) > 1.3


def train(model: Any, seed: int) -> torch.Tensor:
    """Losses of a few optimizer steps, with rows of another length for each seed, one of them padded."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    chance = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(4):
        ids = torch.randint(3, 128, (2, 5 + 2 * seed), generator=chance)
        mask = torch.ones_like(ids)
        mask[0, :seed] = 0
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def test_each_trains_as_it_would_alone(models: Callable[[str], Path], swarm: Swarm) -> None:
    path, clients = models("llama"), range(4)
    (peer,) = swarm.serve(path, "0:5")
    local = transformers.AutoModelForCausalLM.from_pretrained
    expected = [train(with_lora(local(path), 3 * i).train(), i) for i in clients]
    ours = [with_lora(swarm.connect(path), 3 * i).train() for i in clients]  # one by one: they draw from one generator
    found = run_at_once(*(partial(train, ours[i], i) for i in clients))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)
    peer.stop()
    said = re.search(r"ran (\d+) training calls in (\d+) goes", peer.stderr.read_text())
    assert said
    assert int(said[1]) == 4 * 4 * 2
    assert int(said[2]) < int(said[1])


def test_a_bad_request_and_one_that_goes_away(wire: Wire) -> None:
    """The others are answered rightly."""

    async def use() -> None:
        channels = [await wire.greeted() for _ in range(6)]
        for channel in channels:
            await channel.call(OPEN)
        busy = await wire.greeted()
        work = asyncio.create_task(busy.call(forward({"hidden_states": torch.zeros(64, 60, 32)}, training=True)))
        await asyncio.sleep(0.01)
        bad = step(1, attention_mask=torch.ones(1, 9, dtype=torch.long))
        asked = [asyncio.create_task(c.call(bad if i == 1 else step(1))) for i, c in enumerate(channels)]
        await asyncio.sleep(0.01)
        asked[2].cancel()
        channels[2].close()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await work
        assert isinstance(answers[1], SwarmError)
        assert "attention_mask is" in str(answers[1])
        for number in (0, 3, 4, 5):
            answer: Any = answers[number]
            torch.testing.assert_close(answer.tensor("hidden_states"), wire.expected, rtol=0, atol=1e-5)
        for channel in (*channels, busy):
            channel.close()

    wire.run(use())


# ---- the scheduler


def test_what_waits_is_joined_small_work_first() -> None:
    """As far as there is room, without what was cancelled or is of another group."""

    async def use() -> None:
        scheduler, calls = Scheduler(joined_size=10), list[list[str]]()

        def run(items: list[str]) -> list[Any]:
            calls.append(items)
            return [ValueError(item) if item == "bad" else item for item in items]

        def submit(item: str, client: str, size: int = 1, group: str | None = "steps") -> "asyncio.Future[str]":
            return scheduler.submit_batched(Priority.STEP, run, item, client, group, size)

        busy = scheduler.submit(Priority.CALL, lambda: time.sleep(0.05), "other")
        await asyncio.sleep(0.01)
        names = {"head": 50, "large": 9, "small": 1, "bad": 1, "gone": 1, "medium": 8}
        work = {name: submit(name, f"client of {name}", size) for name, size in names.items()}
        lonely, foreign = submit("lonely", "a", group=None), submit("foreign", "b", group="others")
        work["gone"].cancel()
        results = await asyncio.gather(busy, *work.values(), lonely, foreign, return_exceptions=True)
        scheduler.close()
        assert calls == [["head", "small", "bad", "medium"], ["large"], ["lonely"], ["foreign"]]
        assert results[1:4] == ["head", "large", "small"]
        assert isinstance(results[4], ValueError)

    asyncio.run(use())


def run_clients(clients: dict[str, tuple[Priority, int, str]], seconds: float) -> dict[str, float]:
    """Seconds of computing that each kind of work had: a call of 4 ms, whose time those that are in it share."""

    async def use() -> dict[str, float]:
        scheduler, had = Scheduler(), dict.fromkeys(clients, 0.0)
        end = time.monotonic() + seconds

        def run(kinds: list[str]) -> list[None]:
            time.sleep(0.004)
            for kind in kinds:
                had[kind] += 0.004 / len(kinds)
            return [None] * len(kinds)

        async def insist(kind: str) -> None:
            priority, _, client = clients[kind]
            group = "steps" if priority is Priority.STEP else None
            while time.monotonic() < end:
                await scheduler.submit_batched(priority, run, kind, client, group)

        await asyncio.gather(*(insist(kind) for kind, (_, count, _) in clients.items() for _ in range(count)))
        scheduler.close()
        return had

    return asyncio.run(use())


def test_training_has_its_share_among_many_steps() -> None:
    """As much as any other client, though the others' steps go together; and as much as its own client's steps."""
    steps = {f"steps {i}": (Priority.STEP, 4, f"client {i}") for i in range(7)}
    had = run_clients({**steps, "training": (Priority.CALL, 1, "trainer")}, 1.5)
    assert had["training"] > 0.7 * sum(had.values()) / 8
    had = run_clients({"steps": (Priority.STEP, 8, "me"), "training": (Priority.CALL, 1, "me")}, 1.0)
    assert had["training"] > 0.6 * had["steps"]


def mean_riders(priority: Priority, groups: list[str], starts: list[float], pauses: list[float]) -> float:
    """How much work goes in a pass of 30 ms, of clients that begin after so many seconds and pause for so many."""

    async def use() -> float:
        scheduler, riders = Scheduler(), list[int]()
        end = time.monotonic() + 1.5

        def run(items: list[int]) -> list[int]:
            riders.append(len(items))
            time.sleep(0.03)
            return items

        async def talk(number: int) -> None:
            await asyncio.sleep(starts[number])
            while time.monotonic() < end:
                for group in groups:
                    await scheduler.submit_batched(priority, run, number, f"client {number}", group)
                    await asyncio.sleep(pauses[number])

        await asyncio.gather(*(talk(number) for number in range(len(pauses))))
        scheduler.close()
        return sum(riders) / len(riders)

    return asyncio.run(use())


@pytest.mark.parametrize(
    ("priority", "groups", "pauses", "least"),
    [
        (Priority.STEP, ["steps"], [0.0005 * number for number in range(1, 7)], 4.0),
        (Priority.CALL, ["forward", "backward"], [0.001, 0.003], 1.4),
    ],
)
def test_a_call_waits_a_moment_for_those_who_come_just_after(
    priority: Priority, groups: list[str], pauses: list[float], least: float
) -> None:
    """Else the first to come back would ride alone, and the others in its wake, for ever: (1 + 5) / 2 to a call.

    And two who train would miss each other: one would be at its backward when the other comes with its forward.
    """
    assert mean_riders(priority, groups, [0.0] * len(pauses), pauses) > least


def test_two_rounds_become_one() -> None:
    """Four who send while the pass of four others runs would meet these for ever at the device, each round in turn."""
    assert mean_riders(Priority.STEP, ["steps"], [0.0, 0.02] * 4, [0.015] * 8) > 6


def test_a_peer_at_rest_gives_memory_back_once() -> None:
    """What activations took stays with the C library otherwise: gigabytes, after training."""

    async def use() -> list[str]:
        events = list[str]()
        scheduler = Scheduler(at_rest=lambda: events.append("rest"), rest=0.1)
        for pause in (0.02, 0.4, 0.4):
            await scheduler.submit(Priority.STEP, lambda: events.append("work"))
            await asyncio.sleep(pause)
        scheduler.close()
        return events

    assert asyncio.run(use()) == ["work", "work", "rest", "work", "rest"]


def test_freed_memory_goes_back() -> None:
    activations = [torch.ones(2**14) for _ in range(3200)]
    held = psutil.Process().memory_info().rss
    kept = activations[::100]
    del activations
    assert psutil.Process().memory_info().rss > held - 50 * 2**20
    return_freed_memory()
    assert psutil.Process().memory_info().rss < held - 150 * 2**20
    assert len(kept) == 32


def test_what_refers_to_itself_is_found_at_rest() -> None:
    """Dropped adapters' module trees do."""
    gc.disable()
    try:
        tree = torch.nn.Linear(1, 1)
        tree.parent = [tree]
        gone = weakref.ref(tree)
        del tree
        return_freed_memory()
        assert gone() is None
    finally:
        gc.enable()


def learn(streams: int, think: float) -> BatchingWindow:
    """What is learnt from streams that all think for so long, their steps taking 40 ms in calls as they come."""
    window, now, back = BatchingWindow(share=0.15, most=0.02), 0.0, [0.0] * streams
    for _ in range(30):
        now = max(now, min(back))
        until = now + (window.moment if window.pays else 0.0)
        riders = [number for number, at in enumerate(back) if at <= until]
        late = sum(back[number] > now for number in riders)
        ready, now = now, until if window.pays else now
        window.started(ready, now, len(riders), late)
        for number in range(streams):
            if number not in riders:
                window.arrived(back[number])
        now += 0.04
        window.ended(now)
        for place, number in enumerate(riders):
            back[number] = now + think + 0.0005 * place
    return window


def test_who_is_waited_for() -> None:
    assert not learn(1, think=0.001).pays
    assert learn(6, think=0.001).pays
    assert 0 < learn(6, think=0.001).moment < 0.007
    assert not learn(2, think=0.03).pays
