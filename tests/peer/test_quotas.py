"""What one client may have of a peer, and that one who takes all it can get does not starve the others."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bootstrap.member import Member, MemberOptions
from client.swarm.loop import LOOP
from peer.compute.scheduler import Priority, Scheduler
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import BadAdapter, BadRequest, OverQuota, PeerUnreachable, SwarmError, UnknownAdapter
from protocol.tensors import Limits
from tests.tools.spans import WIDTH
from tests.tools.swarm import ForkServer, Swarm
from tests.tools.wire import MAX_LENGTH, OPEN, Wire, forward, manifest, open_wire, put, step

QUOTA = {
    "streams": 6, "sessions": 3, "cache-tokens": 192, "calls": 2, "adapters": 2, "adapter-bytes": 4000, "rate": 100_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[Wire]:
    """A peer that gives a client little."""
    options = [part for name, limit in QUOTA.items() for part in (f"--client-{name}", str(limit))]
    with open_wire(fork_server, models("llama"), "--max-message", str(2**20), *options) as wire:
        yield wire


async def refused(request: Any, error: Any, sentence: str) -> SwarmError:
    with pytest.raises(error, match=sentence) as caught:
        await request
    refusal: SwarmError = caught.value
    assert error is not OverQuota or refusal.retry_after > 0
    return refusal


async def opened(wire: Wire, count: int) -> list[Channel]:
    return [await wire.greeted() for _ in range(count)]


def test_streams(narrow: Wire) -> None:
    async def use() -> None:
        channels = await opened(narrow, 6)
        await channels[0].call(forward())
        one_more = await narrow.open()
        await one_more.call(Message(narrow.hello))
        await refused(one_more.receive_answer(), OverQuota, "One client may have 6 streams on this peer at a time")
        channels.pop().close()
        await asyncio.sleep(0.2)
        channels += await opened(narrow, 1)
        await channels[-1].call(forward())
        for channel in channels:
            channel.close()

    narrow.run(use())


def test_sessions_and_their_copies(narrow: Wire) -> None:
    async def use() -> None:
        channels = await opened(narrow, 4)
        for channel in channels[:3]:
            await channel.call(OPEN)
        await refused(channels[3].call(OPEN), OverQuota, "One client may have 3 sessions on this peer at a time")
        channels[0].close()
        await asyncio.sleep(0.2)
        await channels[3].call(OPEN)
        for channel in channels:
            channel.close()

    narrow.run(use())


def test_tokens_in_caches(narrow: Wire) -> None:
    async def use() -> None:
        channel, other = await opened(narrow, 2)
        await channel.call(OPEN)
        await channel.call(step(1, hidden=torch.zeros(3, MAX_LENGTH, WIDTH)))
        await other.call(OPEN)
        await refused(other.call(step(1)), OverQuota, "may hold 192 tokens in this peer's KV caches")
        channel.close()
        await asyncio.sleep(0.2)
        await other.call(step(1))
        other.close()

    narrow.run(use())


def test_calls_in_flight(narrow: Wire) -> None:
    async def use() -> None:
        channels = await opened(narrow, 5)
        large = forward({"hidden_states": torch.zeros(2, MAX_LENGTH, WIDTH)})
        answers = await asyncio.gather(*(channel.call(large) for channel in channels), return_exceptions=True)
        refusals = [answer for answer in answers if isinstance(answer, OverQuota)]
        assert 1 <= len(refusals) <= 3
        assert "One client may have 2 calls in flight" in str(refusals[0])
        await channels[0].call(forward())
        for channel in channels:
            channel.close()

    narrow.run(use())


def test_adapters(narrow: Wire) -> None:
    """The oldest gives way; one that is too large for itself is refused."""

    async def use() -> None:
        (channel,) = await opened(narrow, 1)
        keys = []
        for value in range(3):
            answer = await channel.call(put(manifest(), torch.full((4, 32), float(value)), torch.ones(32, 4)))
            keys.append(answer.body.token)  # type: ignore[attr-defined]
        await refused(channel.call(forward(adapter=keys[0])), UnknownAdapter, "put it and repeat")
        for key in keys[1:]:
            await channel.call(forward(adapter=key))
        large = manifest(options={"r": 32, "lora_alpha": 8})
        await refused(
            channel.call(put(large, torch.ones(32, 32), torch.ones(32, 32))),
            BadAdapter,
            "over this peer's limit of 4000",
        )
        channel.close()

    narrow.run(use())


def test_bytes_per_second(narrow: Wire) -> None:
    """Too much at once is refused for a while, and the refusal says for how long."""

    async def use() -> None:
        (channel,) = await opened(narrow, 1)
        large = forward({"hidden_states": torch.zeros(24, MAX_LENGTH, WIDTH)})
        await channel.call(large)
        await channel.call(large)  # may be overdrawn by one
        refusal = await refused(channel.call(large), OverQuota, "may send 100,000 bytes per second")
        assert 1 < refusal.retry_after < 2.5
        await asyncio.sleep(refusal.retry_after)
        await channel.call(forward())
        channel.close()

    narrow.run(use())


def test_entries_without_bytes_count(narrow: Wire) -> None:
    async def use() -> None:
        (channel,) = await opened(narrow, 1)
        empty = {str(i): torch.empty(0) for i in range(1000)}
        await channel.call(forward({"hidden_states": torch.zeros(1, 4, WIDTH), **empty}))
        await refused(channel.call(forward()), OverQuota, "bytes per second")
        channel.close()

    narrow.run(use())


def test_messages(narrow: Wire, models: Callable[[str], Path], swarm: Swarm) -> None:
    """A client is told by the peer's greeting; what comes all the same ends the stream."""

    async def use() -> None:
        (channel,) = await opened(narrow, 1)
        request = channel.call(forward({"hidden_states": torch.zeros(200, MAX_LENGTH, WIDTH)}))
        await refused(request, (BadRequest, PeerUnreachable), "over the limit of|broke|closed")
        channel.close()

    narrow.run(use())
    swarm.serve(models("llama"), "0:5", options=("--max-message", str(2**20)))
    model: Any = swarm.connect(models("llama"), micro_batch_tokens=100_000)
    with pytest.raises(BadRequest, match=r"over the limit of \d+ \+ 1048576; send fewer tokens at once"):
        model(torch.ones(200, MAX_LENGTH, dtype=torch.long), use_cache=False)
    model(torch.ones(2, MAX_LENGTH, dtype=torch.long), use_cache=False)


def test_an_answer_that_is_too_large(narrow: Wire) -> None:
    """It says so, and the stream goes on: no client is to take a peer for lost that is well."""

    async def use() -> None:
        (channel,) = await opened(narrow, 1)
        request = forward({"hidden_states": torch.zeros(150, MAX_LENGTH, WIDTH, dtype=torch.bfloat16)})
        await refused(channel.call(request), BadRequest, "1228800 bytes is over the limit of")
        await refused(channel.call(Message(pb.Ping())), OverQuota, "bytes per second")  # answered on the same stream
        channel.close()

    narrow.run(use())


def test_idle_sessions_give_way(models: Callable[[str], Path], swarm: Swarm) -> None:
    """Their clients go on as if nothing had happened."""
    swarm.serve(models("llama"), "0:5", options=("--cache-tokens", "48", "--idle-timeout", "0.3"))
    model: Any = swarm.connect(models("llama"))
    local: Any = transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()

    def talk(model: Any, pause: float) -> list[torch.Tensor]:
        caches = [transformers.DynamicCache(config=model.config) for _ in range(3)]
        said = []
        ids = torch.arange(3, 12)[None]
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        for turn in range(2):
            for number, cache in enumerate(caches):
                time.sleep(pause)
                before = said[number] if turn else ids
                inputs = torch.cat([before, ids + number], 1)
                said.insert(number if turn else len(said), model.generate(inputs, past_key_values=cache, **options))
                if turn:
                    said.pop(number + 1)
        return said

    assert all(map(torch.equal, talk(model, 0.5), talk(local, 0.0)))


# ---- shares of the compute thread


def run_scheduler(clients: dict[str, tuple[Priority, int]], seconds: float) -> dict[str, int]:
    """How many jobs of 10 ms each client got done, of which it always had so many waiting."""

    async def use() -> dict[str, int]:
        scheduler, done = Scheduler(), dict.fromkeys(clients, 0)
        end = time.monotonic() + seconds

        async def insist(client: str, priority: Priority) -> None:
            while time.monotonic() < end:
                await scheduler.submit(priority, lambda: time.sleep(0.01), client)
                done[client] += 1

        await asyncio.gather(*(insist(c, priority) for c, (priority, n) in clients.items() for _ in range(n)))
        scheduler.close()
        return done

    return asyncio.run(use())


def test_compute_time_is_shared_between_clients() -> None:
    greedy = {f"greedy {i}": (Priority.CALL, 8) for i in range(9)}
    done = run_scheduler({**greedy, "polite": (Priority.CALL, 2)}, 3.0)
    share = sum(done.values()) / len(done)
    assert done["polite"] > 0.8 * share


def test_steps_do_not_starve_training() -> None:
    done = run_scheduler({"generating": (Priority.STEP, 8), "training": (Priority.CALL, 1)}, 1.0)
    assert done["training"] > 0.6 * done["generating"]


def test_a_client_that_paused_has_saved_up_nothing() -> None:
    async def use() -> None:
        scheduler = Scheduler()
        for _ in range(20):
            await scheduler.submit(Priority.CALL, lambda: time.sleep(0.005), "busy")
        order: list[str] = []
        jobs = [
            scheduler.submit(Priority.CALL, lambda client=client: (order.append(client), time.sleep(0.005)), client)
            for _ in range(6)
            for client in ("busy", "back")
        ]
        await asyncio.gather(*jobs)
        scheduler.close()
        assert 1 <= order[:6].count("busy") <= 5, order

    asyncio.run(use())


def test_nine_greedy_clients_and_a_polite_one(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    """Each with a p2pd of its own; the greedy ones with six requests at a time, the polite one with two."""
    with open_wire(fork_server, models("llama")) as wire:
        members = [wire.member]

        async def join() -> Member:
            return await Member.join(MemberOptions((wire.peer.address,), client_mode=True))

        members += [LOOP.run(join()) for _ in range(9)]
        work = forward({"hidden_states": torch.zeros(16, MAX_LENGTH, WIDTH)}, training=True)
        done = [0] * 10

        async def insist(number: int, end: float) -> None:
            channel = Channel(await members[number].transport.connect(wire.peer.peer_id), Limits(), 10)
            await channel.call(Message(wire.hello))
            while time.monotonic() < end:
                await channel.call(work)
                done[number] += time.monotonic() > end - 4
            channel.close()

        async def use() -> None:
            end = time.monotonic() + 5
            await asyncio.gather(*(insist(number, end) for number in range(10) for _ in range(6 if number else 2)))

        wire.run(use())
        for member in members[1:]:
            LOOP.run(member.shutdown())
        assert done[0] > 0.8 * sum(done) / 10, done
