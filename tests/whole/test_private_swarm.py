"""A private swarm of real members and a real peer: who is no member, or not any more, gets nothing but refusals."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message as ProtoMessage
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from bootstrap.addresses import split_peer_address
from bootstrap.member import Member, MemberOptions
from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.gate import Bytes
from bootstrap.membership.rounds import RENEW, SYNC
from bootstrap.membership.seal import refusal_in
from bootstrap.validator import model_key
from client import AutoDistributedModelForCausalLM
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import NoSwarm, NotAllowed, NotAMember, PeerUnreachable, SwarmError
from protocol.membership.certificate import Role
from protocol.membership.refusals import Refusal
from protocol.model.checkpoint import open_checkpoint
from protocol.records import Accusation, Complaint, SharedModel, WeightsRecord
from protocol.stream import Carrier, Stream
from protocol.tensors import Limits
from tests.tools.command import Command
from tests.tools.members import HASH, record, send_store, stored_value
from tests.tools.members import member as any_member
from tests.tools.swarm import ForkServer, Swarm, new_swarm
from tests.tools.swarms import WRONG, Machines, home, intruder, let_in, revoke

HINT = "`peer doctor` looks for the cause."
CARRIERS = pytest.mark.parametrize("carrier", ["libp2p", "direct"])


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Machines:
    return Machines(tmp_path_factory.mktemp("machines"))


def member(swarm: SwarmFolder | None, *initial_peers: str, **options: Any) -> AbstractAsyncContextManager[Member]:
    return any_member(*initial_peers, swarm=swarm, **options)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


# The directory


@pytest.mark.parametrize(
    ("founders", "joiners", "why"),
    [
        ("founder", "none", Refusal.STRANGER),
        ("founder", "other", Refusal.OTHER_SWARM),
        ("none", "user", Refusal.OPEN),
    ],
)
def test_joining_another_swarm_fails_at_once(machines: Machines, founders: str, joiners: str, why: Refusal) -> None:
    async def main() -> None:
        async with member(getattr(machines, founders)) as founder:
            begin = time.monotonic()
            swarm = getattr(machines, joiners)
            with pytest.raises(NotAMember) as caught:
                await Member.join(MemberOptions(tuple(founder.addresses), client_mode=True, swarm=swarm))
            assert time.monotonic() - begin < 3
            assert str(caught.value) == why.sentence()
            assert known(founder) == set()

    run(main())


@pytest.mark.parametrize("who", ["none", "other"])
def test_a_stranger_gets_nothing_from_the_directory(
    machines: Machines, who: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        async with (
            member(machines.founder) as founder,
            member(machines.server, *founder.addresses) as victim,
            member(getattr(machines, who)) as stranger,
        ):
            assert await victim.directory.announce(record(victim, name="genuine"), 60)
            await meet(stranger, founder)
            await refuses_everything(stranger, founder)
            # A member takes no answer of a stranger's either.
            await meet(founder, stranger)
            assert await founder._node.protocol.call_ping(stranger._p2p.peer_id) is None
            await asyncio.sleep(0.1)  # hivemind updates its table in tasks
            assert known(founder) == {victim.peer_id}
            assert [subkeys(founder), subkeys(stranger)] == [{victim.peer_id}, set()]
            assert [peer.name for peer in await victim.directory.peers(HASH)] == ["genuine"]

    run(main())
    assert [entry for entry in caplog.records if entry.levelno >= logging.WARNING] == []
    assert "Traceback" not in capfd.readouterr().err


async def refuses_everything(stranger: Member, founder: Member) -> None:
    protocol, target = stranger._node.protocol, founder._p2p.peer_id
    for method, request in requests(stranger).items():
        with pytest.raises(NotAMember):
            await getattr(protocol.get_stub(target), method)(request, timeout=3)
        for data in (request.SerializeToString(), b"\x07garbage", b""):
            assert refusal_in(await send_bytes(stranger, target, method, data)) is Refusal.STRANGER
    key = DHTID.generate(source=model_key(HASH))
    assert await protocol.call_ping(target, validate=True) is None
    assert await protocol.call_find(target, [key]) is None
    assert await protocol.call_store(target, [key], [b"x"], time.time() + 60, subkeys=[stranger.peer_id]) is None


def requests(sender: Member) -> dict[str, ProtoMessage]:
    """One of every kind that a DHT node answers."""
    node = dht_pb2.NodeInfo(node_id=sender._node.node_id.to_bytes())
    key = DHTID.generate(source=model_key(HASH)).to_bytes()
    return {
        "rpc_ping": dht_pb2.PingRequest(peer=node, validate=True),
        "rpc_find": dht_pb2.FindRequest(keys=[key], peer=node),
        "rpc_store": dht_pb2.StoreRequest(
            keys=[key], subkeys=[b"x"], values=[b"x"], expiration_time=[time.time() + 60], in_cache=[False], peer=node
        ),
    }


async def send_bytes(sender: Member, target: PeerID, method: str, data: bytes) -> bytes:
    """The answer to bytes that pass no gate of the sender's."""
    answer: bytes = await sender._p2p.call_protobuf_handler(target, f"DHTProtocol.{method}", Bytes(data), Bytes)
    return answer


async def meet(caller: Member, other: Member) -> None:
    """Connect their p2pd."""
    await caller._p2p.dial(other._p2p.peer_id, [split_peer_address(other.addresses[0])[1]])


def known(peer: Member) -> set[str]:
    return {str(peer_id) for peer_id in peer._node.protocol.routing_table.peer_id_to_uid}


def subkeys(peer: Member) -> set[str]:
    found = peer._node.protocol.storage.get(DHTID.generate(source=model_key(HASH)))
    return {subkey for subkey, _ in found.value.items()} if found is not None else set()


def test_a_recorded_request_is_of_no_use(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with (
            member(machines.founder) as founder,
            member(machines.server, *founder.addresses) as victim,
            member(None) as stranger,
        ):
            recorded = record_calls(victim, monkeypatch)
            assert await victim.directory.announce(record(victim), 60)
            await victim.directory.peers(HASH)
            await meet(stranger, founder)
            target = founder._p2p.peer_id
            calls = [(method, data) for peer, method, data in recorded if peer == target]
            assert {method for method, _ in calls} >= {"rpc_find", "rpc_store"}
            for method, data in calls:
                assert refusal_in(await send_bytes(victim, target, method, data)) is Refusal.REPEATED
                assert refusal_in(await send_bytes(stranger, target, method, data)) is Refusal.OTHER_SWARM
            # Nor can a member pass on what it is asked, or use it for another method.
            _, data = calls[0]
            assert refusal_in(await send_bytes(founder, victim._p2p.peer_id, "rpc_find", data)) is Refusal.OTHER_SWARM
            assert refusal_in(await send_bytes(victim, target, "rpc_ping", data)) is Refusal.OTHER_SWARM

    run(main())


def record_calls(caller: Member, monkeypatch: pytest.MonkeyPatch) -> list[tuple[PeerID, str, bytes]]:
    calls, call = [], caller._p2p.call_protobuf_handler

    async def call_and_record(peer_id: PeerID, name: str, message: Bytes, output: Any) -> Any:
        calls.append((peer_id, name.partition(".")[2], bytes(message)))
        return await call(peer_id, name, message, output)

    monkeypatch.setattr(caller._p2p, "call_protobuf_handler", call_and_record)
    return calls


def test_a_member_cannot_forge_anothers_record(machines: Machines) -> None:
    async def main() -> None:
        async with (
            member(machines.founder) as founder,
            member(machines.server, *founder.addresses) as victim,
            member(machines.server, *founder.addresses) as mallory,
        ):
            mallory._node.protocol.record_validator.validate = lambda record: True
            assert await victim.directory.announce(record(victim, name="genuine"), 60)
            genuine, later, key = stored_value(founder, victim.peer_id), time.time() + 90, model_key(HASH)
            for value in (genuine.value, record(victim, name="forged").to_bytes()):
                assert await send_store(mallory, founder, value, later, key, victim.peer_id) == [False, False]
            assert [peer.name for peer in await founder.directory.peers(HASH)] == ["genuine"]

    run(main())


# Who is known, and may not


@pytest.mark.parametrize("what", WRONG)
def test_the_directory_refuses_who_is_no_member_any_more(machines: Machines, what: str) -> None:
    async def main() -> None:
        async with (
            member(machines.founder) as founder,
            intruder(machines, what, *founder.addresses) as outsider,
        ):
            founder.membership.refresh()
            target, gate = founder._p2p.peer_id, outsider._node.protocol
            for method, request in requests(outsider).items():
                with pytest.raises(NotAMember) as caught:
                    await getattr(gate.get_stub(target), method)(request, timeout=3)
                assert str(caught.value) == WRONG[what].sentence()
            for method in (SYNC, RENEW):
                with pytest.raises(NotAMember):
                    await outsider.rounds._gate.call_protobuf_handler(target, method, Bytes(b""), Bytes)
            # Nor is it asked.
            assert await founder._node.protocol.call_ping(outsider._p2p.peer_id) is None
            await asyncio.sleep(0.1)
            assert known(founder) == set()

    run(main())


def test_who_may_only_use_announces_nothing(machines: Machines) -> None:
    async def main() -> None:
        async with (
            member(machines.founder) as founder,
            member(machines.user, *founder.addresses) as user,
            member(machines.server, *founder.addresses) as server,
        ):
            assert not await user.directory.announce(record(user), 60)
            assert await server.directory.announce(record(server), 60)
            assert [peer.peer_id for peer in await user.directory.peers(HASH)] == [server.peer_id]
            shared = SharedModel(model=record(user).model, manifest="0" * 64, held=1, wanted=1)
            for one in (user, server):
                await one.directory.announce(WeightsRecord(peer_id=one.peer_id, models=(shared,)), 60)
            assert [one.peer_id for one in await founder.directory.weights()] == [server.peer_id]
            complaint = Complaint(
                peer_id=user.peer_id,
                model=record(user).model,
                accused=(Accusation(peer_id=server.peer_id, kind="step"),),
            )
            await user.directory.complain(complaint)
            assert await server.directory.complaints(HASH) == {server.peer_id: 1}
            # Who is put out is forgotten by those who have heard of it, at once.
            revoke(machines.founder, machines.server)
            founder.membership.refresh()
            assert await founder.directory.peers(HASH) == []

    try:
        run(main())
    finally:
        machines.server = let_in(machines.founder, role=Role.SERVE)
    with pytest.raises(NotAllowed, match="role in the swarm lab is use, and this takes serve"):
        run(Member.join(MemberOptions(host="127.0.0.1", swarm=machines.user, role=Role.SERVE)))


@CARRIERS
def test_open_streams_end_when_their_member_is_put_out(machines: Machines, carrier: Carrier) -> None:
    leaver = let_in(machines.founder)

    async def main() -> None:
        async with (
            member(machines.founder, direct_port=0) as founder,
            member(leaver, *founder.addresses, client_mode=True) as client,
        ):
            await founder.transport.serve(lambda stream: serve_echo(founder, stream))
            client.transport.learn(record(founder, direct=founder.door))
            asked, idle = [await open_echo(client, founder, carrier) for _ in range(2)]
            await asked.call(Message(pb.Ping()))
            revoke(machines.founder, leaver)
            begin = time.monotonic()
            with pytest.raises(SwarmError):
                await ask_for_ever(asked)
            with pytest.raises(PeerUnreachable):
                await idle.receive_answer()
            assert time.monotonic() - begin < 3
            with pytest.raises(NotAMember, match="has been revoked"):
                await open_echo(client, founder, carrier)

    run(main())


async def serve_echo(peer: Member, stream: Stream) -> None:
    """What a peer's service does with streams."""
    channel = Channel(stream, Limits(), 5)
    try:
        answer = await peer.handshake.respond(channel)
        while True:
            await channel.send(answer)
            answer = await channel.receive_request()
    except SwarmError as error:
        with suppress(SwarmError):
            await channel.fail(error)


async def ask_for_ever(channel: Channel) -> None:
    while True:
        await channel.call(Message(pb.Ping()))
        await asyncio.sleep(0.05)


async def open_echo(caller: Member, peer: Member, carrier: Carrier) -> Channel:
    channel = Channel(await caller.transport.connect(peer.peer_id, carrier), Limits(), 5)
    await caller.handshake.initiate(channel)
    assert isinstance((await channel.call(Message(pb.Hello()))).body, pb.Hello)
    return channel


# A real peer, and the commands


@pytest.fixture(scope="module")
def served(fork_server: ForkServer, llama: Path, machines: Machines) -> Iterator[Swarm]:
    """The small llama on one peer of a private swarm: its founder's."""
    with new_swarm(fork_server) as made:
        made.home = machines.root / "founder"
        made.serve(llama, "0:5")
        yield made
        assert "Traceback" not in made.peers[0].stderr.read_text()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_commands_need_a_membership(served: Swarm, llama: Path, machines: Machines, command: Command) -> None:
    address = ("--initial-peers", served.initial_peers[0])
    for name in (("status",), ("generate", llama, "w5 w6", "--max-new-tokens", 4)):
        begin = time.monotonic()
        assert command(*name, *address).refusal() == f"error: {Refusal.STRANGER.sentence()} {HINT}"
        with home(machines.root / "other"):
            refused = command(*name, *address, "--swarm", "lab").refusal()
            assert refused == f"error: {Refusal.OTHER_SWARM.sentence()} {HINT}"
        assert time.monotonic() - begin < 8
        with home(machines.root / "USE"):
            outcome = command(*name, *address, "--swarm", "lab")
            assert (outcome.code, outcome.stderr) == (0, "")
            assert outcome.stdout
            assert command(*name).code == 0  # it knows where others are


def test_tune_and_serve_need_a_role(
    served: Swarm, llama: Path, machines: Machines, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "data.txt").write_text("w5 w6 w7 w8\n\nw9 w10 w11\n")
    run = [f"model={llama}", f"data.path={tmp_path / 'data.txt'}", f"output={tmp_path / 'out'}", "trainer.steps=1"]
    tune = ("tune", *run, f"initial_peers={served.initial_peers[0]}", "--plan")
    assert command(*tune).refusal() == f"error: {Refusal.STRANGER.sentence()} {HINT}"
    with home(machines.root / "USE"):
        outcome = command(*tune, "swarm=lab")
        assert outcome.code == 0, outcome.stderr
        assert "peers on the route" in outcome.stdout
        assert "lab is use, and this takes serve" in command("serve", llama, "--host", "127.0.0.1").refusal()
        for name in (("invite",), ("revoke", "founder"), ("invite", "--cancel", "0")):
            assert "lab is use, and this takes admin" in command(*name).refusal()


def stranger_requests(llama: Path) -> list[ProtoMessage]:
    checkpoint = open_checkpoint(str(llama))
    hello = pb.Hello(version=VERSION, config_hash=checkpoint.model_id.config_hash, weights=checkpoint.digests)
    return [
        hello, pb.OpenSession(end=5), pb.Step(number=1), pb.ForkSession(), pb.Forward(), pb.Backward(),
        pb.PutAdapter(manifest="{}"), pb.ReadWeight(names=["0.self_attn.q_proj.weight"]), pb.Factorize(rank=1),
        pb.Ping(), pb.Push(token=bytes(16)),
    ]  # fmt: skip


@CARRIERS
@pytest.mark.parametrize("who", ["none", "other", *WRONG])
def test_who_is_no_member_gets_nothing_from_a_peer(
    served: Swarm, llama: Path, machines: Machines, who: str, carrier: Carrier
) -> None:
    async def main() -> None:
        async with member(machines.user, *served.initial_peers, client_mode=True) as user:
            [found] = await user.directory.peers(open_checkpoint(str(llama)).model_id.config_hash)
        joined: Any = intruder(machines, who) if who in WRONG else member(getattr(machines, who))
        async with joined as stranger:
            stranger.transport.learn(found)
            peer_id, place = split_peer_address(served.initial_peers[0])
            await stranger._p2p.dial(peer_id, [place])
            if who in WRONG:
                await asyncio.sleep(1.2)  # until the peer has seen what its machine knows
            for body in stranger_requests(llama):
                for prove in (False, True):
                    await refuses(stranger, body, prove and who != "none")

    async def ask(stranger: Member, channel: Channel, body: ProtoMessage, prove: bool) -> None:
        if prove:
            await stranger.handshake.initiate(channel)
        await channel.call(Message(body))

    async def refuses(stranger: Member, body: ProtoMessage, prove: bool) -> None:
        channel = Channel(await stranger.transport.connect(served.peers[0].peer_id, carrier), Limits(), 5)
        with pytest.raises(NotAMember):
            await ask(stranger, channel, body, prove)
        with pytest.raises(PeerUnreachable):  # nothing comes after a refusal
            await channel.call(Message(body))

    run(main())


class Waits(Exception):
    """The peer waits for what another is to push."""


@pytest.mark.parametrize("who", ["user", "server"])
def test_only_who_serves_pushes_results(served: Swarm, llama: Path, machines: Machines, who: str) -> None:
    checkpoint, token = open_checkpoint(str(llama)), who.encode().ljust(16)
    hello = pb.Hello(version=VERSION, config_hash=checkpoint.model_id.config_hash, weights=checkpoint.digests)

    async def give_up(working: pb.Working) -> None:
        if working.waiting:
            raise Waits

    async def main() -> None:
        async with member(getattr(machines, who), *served.initial_peers, client_mode=True) as caller:
            channel = Channel(await caller.transport.connect(served.peers[0].peer_id), Limits(), 5)
            await caller.handshake.initiate(channel)
            await channel.call(Message(hello))
            await channel.send(Message(pb.Push(token=token), {"hidden_states": torch.zeros(1, 2, 32)}))
            body = pb.Forward(context=pb.Context(end=5), hand_over=pb.HandOver(awaits=token))
            if who == "user":
                with pytest.raises(Waits):
                    await channel.call(Message(body), give_up)
            else:
                answer = await channel.call(Message(body), give_up)
                assert answer.tensor("hidden_states").shape == (1, 2, 32)
            channel.close()

    run(main())


def test_clocks_that_differ_are_not_taken_for_a_stranger(
    served: Swarm, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootstrap.membership.gate.get_dht_time", lambda: time.time() + 3600)
    with pytest.raises(NoSwarm, match=r"clock and this machine's differ by more than 3 s"):
        run(Member.join(MemberOptions(tuple(served.initial_peers), client_mode=True, swarm=machines.user)))


def test_a_generation_goes_on_until_its_member_is_put_out(served: Swarm, llama: Path, machines: Machines) -> None:
    leaver = let_in(machines.founder, machines.root / "leaver")
    with home(machines.root / "leaver"):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            llama, initial_peers=served.initial_peers, swarm=leaver.name
        )
    text = generate(model)
    assert torch.equal(generate(model), text)
    revoke(machines.founder, leaver)
    begin = time.monotonic()
    with pytest.raises(NotAMember, match="has been revoked"):
        generate_for_ever(model)
    assert time.monotonic() - begin < 6


def generate_for_ever(model: Any) -> None:
    while True:
        generate(model)


def generate(model: Any) -> torch.Tensor:
    return model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
