"""Peers hand their results to each other: the same numbers, also when one dies or cannot reach the next."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LogitsProcessorList

from client.requests.handover import Boundary
from peer.service import handover
from peer.service.handover import Mailbox
from protocol import swarm_pb2 as pb
from protocol.channel import PUSH_TOKEN_BYTES, Message
from protocol.errors import BadRequest, NotPushed
from tests.tools.arena import AtToken, assert_close, batch, step, with_adapter
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm
from tests.tools.wire import HIDDEN, OPEN, Wire, context, forward, open_wire

SPANS = ("0:2", "2:3", "3:5")


@pytest.fixture(scope="module")
def served(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[tuple[Path, Swarm]]:
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), *SPANS)
        yield models("llama"), swarm


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each result that a peer was asked to hand on, whether it did."""
    found, original = list[bool](), Boundary.passed

    async def note(self: Boundary, result: torch.Tensor | None, pushed: bool) -> None:
        found.append(pushed)
        await original(self, result, pushed)

    monkeypatch.setattr(Boundary, "passed", note)
    return found


@pytest.fixture(scope="module")
def local(models: Callable[[str], Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()


def connect(swarm: Swarm, path: Path, **options: Any) -> Any:
    model = swarm.connect(path, hand_over_above=0, **options)
    for peer in model.swarm.peers():  # as after a first use: far enough away
        model.swarm.health.measured(peer.peer_id, 0.1)
    return model


@pytest.mark.parametrize("how", ["greedy", "beams", "chunks", "prompt_lookup"])
def test_generation(how: str, served: tuple[Path, Swarm], passed: list[bool], local: Any) -> None:
    path, swarm = served
    model = connect(swarm, path, prefill_chunk_tokens=4 if how == "chunks" else 512)
    options = batch() | ({"num_beams": 3} if how == "beams" else {})
    if how == "prompt_lookup":
        ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
        options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(**options), local.generate(**options))
    assert len(passed) >= 2 * 4
    assert all(passed)


@pytest.mark.parametrize("method", ["lora", "prefix", "dropout"])
def test_training(method: str, served: tuple[Path, Swarm], passed: list[bool], models: Callable[[str], Path]) -> None:
    """In micro-batches; forward and backward pass each border once."""
    path, swarm = served
    model = with_adapter(connect(swarm, path, micro_batch_tokens=14), method)
    theirs = with_adapter(connect(swarm, path, micro_batch_tokens=14, verify=1e-9), method)  # not handed over
    ours = step(model)
    assert passed == [True] * (2 * 2 * 3)
    assert_close(ours, step(theirs))
    if method != "dropout":
        assert_close(ours, step(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(path), method)))
    assert passed == [True] * (2 * 2 * 3)


def test_an_adapter_that_the_peers_lack(served: tuple[Path, Swarm], passed: list[bool], local: Any) -> None:
    """A request that is refused for it is repeated, and still gets what is pushed."""
    path, swarm = served
    ours = with_adapter(connect(swarm, path)).eval()
    theirs = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(path)).eval()
    assert torch.equal(ours.generate(**batch()), theirs.generate(**batch()))
    assert passed
    assert all(passed)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_killed_in_a_generation(
    index: int, fork_server: ForkServer, models: Callable[[str], Path], local: Any, passed: list[bool]
) -> None:
    """The first, a middle and the last peer."""
    with new_swarm(fork_server) as swarm:
        swarm.launch("bootstrap", "--host", "127.0.0.1").wait_ready()
        peers = swarm.serve(models("llama"), *SPANS, SPANS[index])
        model = connect(swarm, models("llama"))
        victim = victim_of(model, peers, index)
        killer = AtToken(5, victim.kill)
        tokens = model.generate(**batch(), logits_processor=LogitsProcessorList([killer]))
        assert killer.done
        assert torch.equal(tokens, local.generate(**batch()))
        assert sum(passed) > 2 * 8  # it goes on with the heir


@pytest.mark.parametrize("when", ["between", "within"])
def test_killed_in_training(
    when: str, fork_server: ForkServer, models: Callable[[str], Path], passed: list[bool]
) -> None:
    """Between forward and backward what the victim kept is lost; within a forward those after it wait for a push."""
    with new_swarm(fork_server) as swarm:
        swarm.launch("bootstrap", "--host", "127.0.0.1").wait_ready()
        slow = "slow" if when == "within" else None
        peers = [*swarm.serve(models("llama"), *SPANS[:1], SPANS[2]), *swarm.serve(models("llama"), SPANS[1], lie=slow)]
        peers += swarm.serve(models("llama"), SPANS[1])
        model = with_adapter(connect(swarm, models("llama")))
        victim = peers[2]
        model.swarm.health.measured(peers[3].peer_id, 9.0)
        assert model.swarm.route("forward")[1].peer.peer_id == victim.peer_id
        theirs = step(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama"))))
        if when == "within":
            timer = threading.Timer(0.15, victim.kill)
            timer.start()
            assert_close(step(model), theirs)
            timer.join()
        else:
            assert_close(step(model, victim.kill), theirs)
        assert_close(step(model), theirs)
        assert passed[-4:] == [True] * 4


@pytest.mark.parametrize("lie", ["cut off", "loses pushes"])
def test_a_peer_that_hands_nothing_on(
    lie: str, fork_server: ForkServer, models: Callable[[str], Path], local: Any, passed: list[bool]
) -> None:
    """It cannot reach the next peer, and says so; or it does not know that what it sent never came."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), SPANS[0])
        swarm.serve(models("llama"), SPANS[1], lie=lie)
        swarm.serve(models("llama"), SPANS[2])
        model = connect(swarm, models("llama"))
        assert torch.equal(model.generate(**batch()), local.generate(**batch()))
        assert passed == [True, lie == "loses pushes"]  # once is enough
        model = with_adapter(connect(swarm, models("llama")))
        theirs = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama")))
        assert_close(step(model), step(theirs))


def test_signs_of_life_while_the_next_peer_hangs(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    """A client that hears nothing would take the peer that waits for the one that hangs."""
    to = pb.HandOver(to="the next", token=b"1" * PUSH_TOKEN_BYTES)
    requests = [
        Message(pb.Forward(context=context(), hand_over=to), {"hidden_states": HIDDEN}),
        Message(pb.Backward(context=context(), hand_over=to), {"hidden_states": HIDDEN, "grad": HIDDEN}),
        Message(pb.Step(context=context(), number=1, hand_over=to), {"hidden_states": HIDDEN}),
    ]

    async def ask(wire: Wire, request: Message) -> None:
        channel, signs = await wire.greeted(), list[pb.Working]()

        async def note(sign: pb.Working) -> None:
            signs.append(sign)

        await channel.call(OPEN)
        answer = await channel.call(request, note)
        assert not answer.body.pushed  # type: ignore[attr-defined]
        assert answer.tensors
        assert len(signs) >= 3
        channel.close()

    with open_wire(fork_server, models("llama"), lie="hangs on pushes") as wire:
        for request in requests:
            wire.run(ask(wire, request))


def victim_of(model: Any, peers: list[Peer], index: int) -> Peer:
    """The peer that hop number `index` goes through."""
    peer_id = model.swarm.route()[index].peer.peer_id
    return next(peer for peer in peers if peer.peer_id == peer_id)


# ---- the mailbox


def parcel(size: int = 1) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.ones(size)}


def test_a_push_before_and_after_its_request() -> None:
    async def main() -> None:
        box, first, second = Mailbox(100), b"1" * PUSH_TOKEN_BYTES, b"2" * PUSH_TOKEN_BYTES
        box.put(first, parcel())
        assert (await box.take(first)).keys() == {"hidden_states"}
        waiting = asyncio.create_task(box.take(second))
        await asyncio.sleep(0)
        with pytest.raises(BadRequest, match="one request waits"):
            await box.take(second)
        box.put(second, parcel(3))
        assert (await waiting)["hidden_states"].shape == (3,)

    asyncio.run(main())


def test_what_nobody_asks_for_is_forgotten() -> None:
    async def main() -> None:
        box = Mailbox(100, patience=0.05)
        for number in range(50):
            box.put(bytes([number]) * PUSH_TOKEN_BYTES, parcel(10))
        assert len(box._parcels) == 2
        with pytest.raises(NotPushed, match="No other peer pushed"):
            await box.take(bytes([0]) * PUSH_TOKEN_BYTES)

    asyncio.run(main())


def test_what_nobody_asks_for_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing else comes."""
    monkeypatch.setattr(handover, "_KEPT", 0.4)

    async def main() -> None:
        box, token = Mailbox(100, patience=0.01), b"4" * PUSH_TOKEN_BYTES
        box.put(token, parcel())
        await asyncio.sleep(0.25)
        box.put(token, parcel(2))  # its time begins anew
        await asyncio.sleep(0.25)
        assert (await box.take(token))["hidden_states"].shape == (2,)
        box.put(token, parcel())
        await asyncio.sleep(0.5)
        assert not box._parcels
        with pytest.raises(NotPushed):
            await box.take(token)

    asyncio.run(main())


@pytest.mark.parametrize("token", [b"", b"short", b"3" * PUSH_TOKEN_BYTES])
def test_what_is_no_push(token: bytes) -> None:
    with pytest.raises(BadRequest, match="A Push has"):
        Mailbox(100).put(token, parcel() | {"another": torch.ones(1)})


def test_a_push_that_is_refused_is_not_answered(wire: Wire) -> None:
    """An answer to it would be taken for that to the next request on the stream."""

    async def push() -> Message:
        channel = await wire.greeted()
        await channel.send(Message(pb.Push(token=b"short"), parcel()))
        return await channel.call(forward({"hidden_states": HIDDEN}))

    assert wire.run(push()).tensor("hidden_states").shape == HIDDEN.shape
