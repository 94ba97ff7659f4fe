"""A private swarm of real members and a real peer: strangers get nothing but refusals, keys change while it runs."""

import asyncio
import logging
import shutil
import time
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message as ProtoMessage
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from bootstrap.addresses import split_peer_address
from bootstrap.gate import Bytes
from bootstrap.key_file import add_key, create_key, drop_old_keys, use_newest_key
from bootstrap.member import Member, MemberOptions
from bootstrap.seal import Refusal, refusal_in
from bootstrap.validator import model_key
from client import AutoDistributedModelForCausalLM
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import NoSwarm, PeerFailed, PeerUnreachable, SwarmError, WrongKey
from protocol.model.checkpoint import open_checkpoint
from protocol.stream import Carrier, Stream
from protocol.swarm_key import NO_KEY, OPEN, REFUSED
from protocol.tensors import Limits
from tests.tools.command import Command
from tests.tools.members import HASH, record, send_store, stored_value
from tests.tools.members import member as any_member
from tests.tools.swarm import ForkServer, Swarm, new_swarm

Keys = dict[str, Path | None]
CARRIERS = pytest.mark.parametrize("carrier", ["libp2p", "direct"])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "other"):
        create_key(folder / name)
    return {"ours": folder / "ours", "other": folder / "other", "none": None}


def member(key: Path | None, *initial_peers: str, **options: Any) -> AbstractAsyncContextManager[Member]:
    return any_member(*initial_peers, swarm_key=key, **options)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


# The directory


@pytest.mark.parametrize(
    ("founders", "joiners", "said"), [("ours", "none", NO_KEY), ("ours", "other", REFUSED), ("none", "ours", OPEN)]
)
def test_joining_with_a_wrong_key_fails_at_once(keys: Keys, founders: str, joiners: str, said: str) -> None:
    async def main() -> None:
        async with member(keys[founders]) as founder:
            for client_mode in (True, False):
                begin = time.monotonic()
                with pytest.raises(WrongKey) as caught:
                    await Member.join(
                        MemberOptions(
                            tuple(founder.addresses), "127.0.0.1", client_mode=client_mode, swarm_key=keys[joiners]
                        )
                    )
                assert time.monotonic() - begin < 3
                assert str(caught.value) == said
            assert known(founder) == set()

    run(main())


@pytest.mark.parametrize("key", ["none", "other"])
def test_a_stranger_gets_nothing_from_the_directory(
    keys: Keys, key: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        async with (
            member(keys["ours"]) as founder,
            member(keys["ours"], *founder.addresses) as victim,
            member(keys[key]) as stranger,
        ):
            assert await victim.directory.announce(record(victim, name="genuine"), 60)
            await meet(stranger, founder)
            await refuses_everything(stranger, founder)
            # A member takes no answer of a stranger's either.
            await meet(founder, stranger)
            assert await founder._node.protocol.call_ping(stranger._p2p.peer_id) is None
            await asyncio.sleep(0.1)  # hivemind updates its table in tasks
            assert known(founder) == {victim.peer_id}
            assert known(stranger) == set()
            assert [subkeys(founder), subkeys(stranger)] == [{victim.peer_id}, set()]
            assert [peer.name for peer in await victim.directory.peers(HASH)] == ["genuine"]

    run(main())
    assert [entry for entry in caplog.records if entry.levelno >= logging.WARNING] == []
    assert "Traceback" not in capfd.readouterr().err


async def refuses_everything(stranger: Member, founder: Member) -> None:
    protocol, target = stranger._node.protocol, founder._p2p.peer_id
    for method, request in requests(stranger).items():
        with pytest.raises(WrongKey):
            await getattr(protocol.get_stub(target), method)(request, timeout=3)
        for data in (request.SerializeToString(), b"\x07garbage", b""):
            assert refusal_in(await send_bytes(stranger, target, method, data)) is Refusal.NO_KEY
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


def test_a_recorded_request_is_of_no_use(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with (
            member(keys["ours"]) as founder,
            member(keys["ours"], *founder.addresses) as victim,
            member(keys["none"]) as stranger,
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
                assert refusal_in(await send_bytes(stranger, target, method, data)) is Refusal.WRONG_KEY
            # Nor can a member pass on what it is asked, or use it for another method.
            _, data = calls[0]
            assert refusal_in(await send_bytes(founder, victim._p2p.peer_id, "rpc_find", data)) is Refusal.WRONG_KEY
            assert refusal_in(await send_bytes(victim, target, "rpc_ping", data)) is Refusal.WRONG_KEY

    run(main())


def record_calls(caller: Member, monkeypatch: pytest.MonkeyPatch) -> list[tuple[PeerID, str, bytes]]:
    calls, call = [], caller._p2p.call_protobuf_handler

    async def call_and_record(peer_id: PeerID, name: str, message: Bytes, output: Any) -> Any:
        calls.append((peer_id, name.partition(".")[2], bytes(message)))
        return await call(peer_id, name, message, output)

    monkeypatch.setattr(caller._p2p, "call_protobuf_handler", call_and_record)
    return calls


def test_a_member_cannot_forge_anothers_record(keys: Keys) -> None:
    async def main() -> None:
        async with (
            member(keys["ours"]) as founder,
            member(keys["ours"], *founder.addresses) as victim,
            member(keys["ours"], *founder.addresses) as mallory,
        ):
            mallory._node.protocol.record_validator.validate = lambda record: True
            assert await victim.directory.announce(record(victim, name="genuine"), 60)
            genuine, later, key = stored_value(founder, victim.peer_id), time.time() + 90, model_key(HASH)
            for value in (genuine.value, record(victim, name="forged").to_bytes()):
                assert await send_store(mallory, founder, value, later, key, victim.peer_id) == [False, False]
            assert [peer.name for peer in await founder.directory.peers(HASH)] == ["genuine"]

    run(main())


# Rotation


@CARRIERS
def test_keys_change_while_the_swarm_runs(tmp_path: Path, carrier: Carrier) -> None:
    """A founder, a peer and a client, each with its own copy of the file; every order in which the copies change."""
    master = tmp_path / "master"
    create_key(master)
    files = [Path(shutil.copy(master, tmp_path / name)) for name in ("founder", "peer", "client", "left behind")]

    async def main() -> None:
        async with (
            member(files[0]) as founder,
            member(files[1], *founder.addresses, direct_port=0) as peer,
            member(files[2], *founder.addresses, client_mode=True) as client,
            member(files[3], *founder.addresses, client_mode=True) as left_behind,
        ):
            await peer.transport.serve(lambda stream: serve_echo(peer, stream))
            await works(peer, client, carrier)
            left_behind.transport.learn(record(peer, direct=peer.door))
            first = await open_echo(client, peer, carrier)
            for number, step in enumerate((add_key, use_newest_key, drop_old_keys)):
                step(master)
                for file in (files[:3], files[2::-1])[number % 2]:
                    shutil.copy(master, file)
                    await works(peer, client, carrier)
            with pytest.raises(PeerFailed, match="open another"):
                await first.call(Message(pb.Ping()))
            with pytest.raises(WrongKey) as caught:
                await left_behind.directory.peers(HASH)
            assert str(caught.value) == REFUSED
            with pytest.raises(WrongKey):
                await open_echo(left_behind, peer, carrier)
            with pytest.raises(WrongKey):
                await Member.join(MemberOptions(tuple(founder.addresses), client_mode=True, swarm_key=files[3]))
            shutil.copy(master, files[3])
            await works(peer, left_behind, carrier)

    run(main())


async def works(peer: Member, client: Member, carrier: Carrier) -> None:
    name = f"at {time.time()}"
    assert await peer.directory.announce(record(peer, name=name, direct=peer.door), 60)
    assert [found.name for found in await client.directory.peers(HASH)] == [name]
    (await open_echo(client, peer, carrier)).close()


async def serve_echo(peer: Member, stream: Stream) -> None:
    """What a peer's service does with keys."""
    channel = Channel(stream, Limits(), 5)
    try:
        answer = await peer.handshake.respond(channel)
        while True:
            await channel.send(answer)
            answer = await channel.receive_request()
            peer.handshake.check_current(channel)
    except SwarmError as error:
        await channel.fail(error)


async def open_echo(caller: Member, peer: Member, carrier: Carrier) -> Channel:
    channel = Channel(await caller.transport.connect(peer.peer_id, carrier), Limits(), 5)
    await caller.handshake.initiate(channel)
    assert isinstance((await channel.call(Message(pb.Hello()))).body, pb.Hello)
    return channel


# A real peer, and the commands


@pytest.fixture(scope="module")
def served(fork_server: ForkServer, llama: Path, keys: Keys) -> Iterator[Swarm]:
    """The small llama on one peer of a private swarm."""
    with new_swarm(fork_server) as made:
        made.serve(llama, "0:5", options=("--swarm-key", str(keys["ours"])))
        yield made
        assert "Traceback" not in made.peers[0].stderr.read_text()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_commands_need_the_key(served: Swarm, llama: Path, keys: Keys, command: Command) -> None:
    for name in (("status",), ("generate", llama, "w5 w6", "--max-new-tokens", 4)):
        for key, said in (("none", NO_KEY), ("other", REFUSED)):
            begin = time.monotonic()
            outcome = command(*name, "--initial-peers", served.initial_peers[0], *flag(keys[key]))
            assert outcome.refusal() == f"error: {said}"
            assert time.monotonic() - begin < 4
        outcome = command(*name, "--initial-peers", served.initial_peers[0], *flag(keys["ours"]))
        assert (outcome.code, outcome.stderr) == (0, "")
        assert outcome.stdout


def test_tune_needs_the_key(served: Swarm, llama: Path, keys: Keys, command: Command, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("w5 w6 w7 w8\n\nw9 w10 w11\n")
    run = [f"model={llama}", f"data.path={tmp_path / 'data.txt'}", f"output={tmp_path / 'out'}", "trainer.steps=1"]
    tune = ("tune", *run, f"initial_peers={served.initial_peers[0]}", "--plan")
    assert command(*tune, *flag(keys["other"])).refusal() == f"error: {REFUSED}"
    outcome = command(*tune, f"swarm_key={keys['ours']}")
    assert outcome.code == 0, outcome.stderr
    assert "peers on the route" in outcome.stdout


def flag(key: Path | None) -> tuple[str, ...]:
    return () if key is None else ("--swarm-key", str(key))


def stranger_requests(llama: Path) -> list[ProtoMessage]:
    checkpoint = open_checkpoint(str(llama))
    hello = pb.Hello(version=VERSION, config_hash=checkpoint.model_id.config_hash, weights=checkpoint.digests)
    return [
        hello, pb.OpenSession(end=5), pb.Step(number=1), pb.ForkSession(), pb.Forward(), pb.Backward(),
        pb.PutAdapter(manifest="{}"), pb.ReadWeight(names=["0.self_attn.q_proj.weight"]), pb.Factorize(rank=1),
        pb.Ping(),
    ]  # fmt: skip


@CARRIERS
@pytest.mark.parametrize("key", ["none", "other"])
def test_a_stranger_gets_nothing_from_a_peer(
    served: Swarm, llama: Path, keys: Keys, key: str, carrier: Carrier
) -> None:
    async def main() -> None:
        async with member(keys["ours"], *served.initial_peers, client_mode=True) as traitor:
            [found] = await traitor.directory.peers(open_checkpoint(str(llama)).model_id.config_hash)
        async with member(keys[key]) as stranger:
            stranger.transport.learn(found)
            address = split_peer_address(served.initial_peers[0])
            await stranger._p2p.dial(address[0], [address[1]])
            for body in stranger_requests(llama):
                for prove in (False, True):
                    await refuses(stranger, body, prove and keys[key] is not None)

    async def refuses(stranger: Member, body: ProtoMessage, prove: bool) -> None:
        channel = Channel(await stranger.transport.connect(served.peers[0].peer_id, carrier), Limits(), 5)
        if prove:
            with pytest.raises(WrongKey):
                await stranger.handshake.initiate(channel)
        else:
            with pytest.raises(WrongKey):
                await channel.call(Message(body))
        with pytest.raises(PeerUnreachable):  # nothing comes after a refusal
            await channel.call(Message(body))

    run(main())


def test_clocks_that_differ_are_no_wrong_key(served: Swarm, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootstrap.gate.get_dht_time", lambda: time.time() + 3600)
    with pytest.raises(NoSwarm, match=r"clock and this machine's differ by more than 3 s"):
        run(Member.join(MemberOptions(tuple(served.initial_peers), client_mode=True, swarm_key=keys["ours"])))


def test_a_generation_goes_on_while_keys_change(served: Swarm, llama: Path, keys: Keys, tmp_path: Path) -> None:
    key, old = keys["ours"], Path(shutil.copy(keys["ours"], tmp_path / "old"))
    model, left_behind = (
        AutoDistributedModelForCausalLM.from_pretrained(llama, initial_peers=served.initial_peers, swarm_key=str(path))
        for path in (key, old)
    )
    texts = [generate(model), generate(left_behind)]
    for step in (add_key, use_newest_key, drop_old_keys):
        step(key)
        texts.append(generate(model))
    assert all(torch.equal(text, texts[0]) for text in texts)
    begin = time.monotonic()
    with pytest.raises(WrongKey):
        generate(left_behind)
    assert time.monotonic() - begin < 6


def generate(model: Any) -> torch.Tensor:
    return model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
