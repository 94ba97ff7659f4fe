"""The handshake with which members of a private swarm begin their streams. No p2pd, no model."""

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message as ProtoMessage

from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.own import OwnMembership
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import NotAllowed, NotAMember, PeerUnreachable, SwarmError
from protocol.membership import handshake
from protocol.membership.certificate import Role
from protocol.membership.handshake import Handshake, require
from protocol.membership.refusals import Refusal
from protocol.membership.secret import SwarmSecret
from protocol.tensors import Limits
from protocol.transport.socket_stream import SocketStream
from tests.tools.swarms import found, let_in, revoke

HELLO = pb.Hello(version=1, config_hash="0123456789abcdef" * 2, weights={"model.safetensors": "f" * 32})


class Folders:
    """Two swarms: the founder and a member of one, the founder of another."""

    def __init__(self, root: Path):
        self.founder, self.theirs = found(root / "founder"), found(root / "theirs")
        self.user = let_in(self.founder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("swarms"))


def member(name: str, folder: SwarmFolder | None = None) -> Handshake:
    return Handshake(name, OwnMembership(folder, name) if folder is not None else None)


class Tap:
    """What was written to a stream."""

    def __init__(self, stream: SocketStream):
        self._stream, self.written = stream, b""
        self.remote = stream.remote

    @property
    def available(self) -> int:
        return self._stream.available

    async def send(self, *buffers: Any, patience: float | None) -> None:
        self.written += b"".join(bytes(buffer) for buffer in buffers)
        await self._stream.send(*buffers, patience=patience)

    async def receive(self, count: int, patience: float | None) -> bytearray:
        return await self._stream.receive(count, patience)

    def close(self) -> None:
        self._stream.close()


async def line(caller: str = "alice", peer: str = "bob") -> tuple[Channel, Channel]:
    """The two ends of a stream: the caller's, who sees `peer`, and the peer's, who sees `caller`."""
    ends = []
    for end, remote in zip(socket.socketpair(), (peer, caller), strict=True):
        reader, writer = await asyncio.open_connection(sock=end)
        ends.append(Channel(Tap(await SocketStream.adopt(remote, reader, writer)), Limits(), 5))
    return ends[0], ends[1]


async def call(caller: Handshake, channel: Channel) -> ProtoMessage:
    try:
        await caller.initiate(channel)
    except SwarmError:
        channel.close()
        raise
    return (await channel.call(Message(HELLO))).body


async def answer(peer: Handshake, channel: Channel) -> ProtoMessage:
    """What a service does with a stream."""
    try:
        hello = (await peer.respond(channel)).body
    except SwarmError as error:
        await channel.fail(error)
        raise
    await channel.send(Message(pb.Welcome()))
    return hello


def meet(
    caller: Handshake, peer: Handshake, names: tuple[str, str] = ("alice", "bob")
) -> tuple[Any, Any, Channel, Channel]:
    """What a handshake and a Hello come to at both ends: a message or an error."""

    async def main() -> tuple[Any, Any, Channel, Channel]:
        ours, theirs = await line(*names)
        results = await asyncio.gather(call(caller, ours), answer(peer, theirs), return_exceptions=True)
        ours.close()
        theirs.close()
        return (*results, ours, theirs)

    return run(main())


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 15))


def test_members_meet(folders: Folders) -> None:
    for callers, peers in ((folders.user, folders.founder), (folders.founder, folders.user), (None, None)):
        welcome, hello, ours, theirs = meet(member("alice", callers), member("bob", peers))
        assert isinstance(welcome, pb.Welcome)
        assert hello == HELLO
        assert (ours.limits, theirs.limits) == (Limits(), Limits())
        if callers is None:
            assert (ours.standing, theirs.standing) == (None, None)
        else:
            roles = [ours.standing.role, theirs.standing.role]
            assert roles == [peers.certificate().role, callers.certificate().role]


def test_strangers_are_refused_and_told_why(folders: Folders) -> None:
    for callers, peers, why in (
        (None, folders.user, Refusal.STRANGER),
        (folders.theirs, folders.user, Refusal.OTHER_SWARM),
        (folders.user, None, Refusal.OPEN),
    ):
        told, seen, ours, _ = meet(member("alice", callers), member("bob", peers))
        assert isinstance(told, NotAMember)
        assert isinstance(seen, NotAMember)
        assert str(told).startswith(why.sentence().rstrip("."))
        if callers is not None:
            assert HELLO.config_hash.encode() not in ours.stream.written
            assert callers.key.public not in ours.stream.written


def test_the_secret_alone_lets_nobody_in(folders: Folders, tmp_path: Path) -> None:
    """Who shows what is no certificate of his own peer ID, from the root, in force, is refused, whoever calls."""
    genuine, other_root = OwnMembership(folders.user, "alice"), found(tmp_path / "other")
    shown = {
        b"": Refusal.OTHER_SWARM,
        b"junk": Refusal.OTHER_SWARM,
        folders.user.certificate().signed: Refusal.OTHER_PROCESS,
        OwnMembership(folders.user, "mallory").certificate(): Refusal.OTHER_PROCESS,
        OwnMembership(other_root, "alice").certificate(): Refusal.OTHER_SWARM,
        OwnMembership(let_in(folders.founder, lifetime=5, ago=10), "alice").certificate(): Refusal.EXPIRED,
    }
    for certificate, why in shown.items():
        genuine.certificate = lambda certificate=certificate: certificate
        told, seen, *_ = meet(Handshake("alice", genuine), member("bob", folders.founder))
        for error in (told, seen):
            assert isinstance(error, NotAMember)
            assert str(error).startswith(why.sentence().rstrip("."))
        told, _, ours, _ = meet(member("bob", folders.founder), Handshake("alice", genuine), names=("bob", "alice"))
        assert isinstance(told, NotAMember)
        assert "peer alice" in str(told) or why is Refusal.OTHER_PROCESS
        assert folders.founder.certificate().signed not in ours.stream.written


def test_who_is_put_out_is_out_of_open_streams_too(folders: Folders) -> None:
    leaver = let_in(folders.founder)
    peer = member("bob", folders.founder)

    async def main() -> None:
        ours, theirs = await line()
        await asyncio.gather(call(member("alice", leaver), ours), answer(peer, theirs))
        await ours.send(Message(pb.Ping()))
        revoke(folders.founder, leaver)
        peer._membership.refresh()
        with pytest.raises(NotAMember, match="has been revoked"):
            await theirs.receive_request()
        with pytest.raises(NotAMember, match="has been revoked"):
            await theirs.send(Message(pb.Result()))
        await theirs.fail(NotAMember("It is out."))
        with pytest.raises(NotAMember, match="It is out"):
            await ours.receive_answer()
        peer.enforce()
        with pytest.raises(PeerUnreachable):
            await ours.call(Message(pb.Ping()))

    run(main())


def test_a_role_is_what_the_certificate_says(folders: Folders) -> None:
    _, _, ours, theirs = meet(member("alice", folders.user), member("bob", folders.founder))
    require(theirs, Role.USE)
    with pytest.raises(NotAllowed, match="takes the role serve"):
        require(theirs, Role.SERVE)
    require(ours, Role.ADMIN)
    _, _, ours, theirs = meet(member("alice"), member("bob"))
    require(theirs, Role.ADMIN)


REQUESTS = [
    pb.OpenSession(end=1), pb.Step(number=1), pb.ForkSession(), pb.Forward(), pb.Backward(), pb.PutAdapter(),
    pb.ReadWeight(), pb.Factorize(), pb.Ping(), pb.Hello(), pb.Welcome(), pb.Proof(), pb.Knock(), pb.Working(),
    pb.Knock(nonce=bytes(32), mac=bytes(32)),
]  # fmt: skip


@pytest.mark.parametrize("request_body", REQUESTS, ids=lambda body: type(body).__name__)
def test_nothing_may_come_before_the_handshake(request_body: ProtoMessage, folders: Folders) -> None:
    async def main() -> None:
        ours, theirs = await line()
        peer = asyncio.create_task(answer(member("bob", folders.founder), theirs))
        with pytest.raises(SwarmError):
            await ours.call(Message(request_body))
        with pytest.raises(SwarmError):
            await peer
        assert theirs.standing is None

    run(main())


def test_a_handshake_cannot_be_replayed(folders: Folders) -> None:
    async def main() -> None:
        ours, theirs = await line()
        await asyncio.gather(call(member("alice", folders.user), ours), answer(member("bob", folders.founder), theirs))
        again, theirs = await line()
        await again.stream.send(ours.stream.written, patience=5)
        with pytest.raises(NotAMember):
            await answer(member("bob", folders.founder), theirs)
        assert isinstance((await again.receive_answer()).body, pb.Proof)
        with pytest.raises(NotAMember):
            await again.receive_answer()

    run(main())


def test_a_peers_proof_is_no_callers_proof(folders: Folders) -> None:
    """Who lacks the key gets a proof from the peer, and sends it back as its own."""

    async def main() -> None:
        ours, theirs = await line()
        peer = asyncio.create_task(answer(member("bob", folders.founder), theirs))
        proof = (await ours.call(Message(knock(folders)))).body
        await ours.send(Message(proof))
        with pytest.raises(NotAMember):
            await peer

    run(main())


def test_a_handshake_cannot_be_passed_on(folders: Folders) -> None:
    """mallory, whom alice calls, shows alice's handshake to bob as her own, and bob's to alice."""

    async def main() -> None:
        alices, mallorys = await line("alice", "mallory")
        to_bob, bobs = await line("mallory", "bob")
        alice = asyncio.create_task(call(member("alice", folders.user), alices))
        bob = asyncio.create_task(answer(member("bob", folders.founder), bobs))
        await to_bob.send(await mallorys.receive_request())
        with pytest.raises(NotAMember):
            await to_bob.receive_answer()
        with pytest.raises(NotAMember):
            await bob
        to_bob, bobs = await line("alice", "bob")  # as if mallory could speak as alice
        bob = asyncio.create_task(answer(member("bob", folders.founder), bobs))
        await to_bob.send(Message(knock(folders)))
        await mallorys.send(await to_bob.receive_answer())
        with pytest.raises(NotAMember, match="mallory is no member"):
            await alice
        assert HELLO.config_hash.encode() not in alices.stream.written
        assert folders.user.key.public not in alices.stream.written
        to_bob.close()
        with pytest.raises(PeerUnreachable):
            await bob

    run(main())


@pytest.mark.parametrize(
    "reply", [pb.Proof(), pb.Proof(nonce=bytes(32), certificate=b"x", mac=bytes(32)), pb.Welcome()]
)
def test_a_client_says_nothing_to_a_peer_without_the_secret(reply: ProtoMessage, folders: Folders) -> None:
    async def main() -> None:
        ours, theirs = await line()
        client = asyncio.create_task(call(member("alice", folders.user), ours))
        await theirs.receive_request()
        await theirs.send(Message(reply))
        with pytest.raises(SwarmError):
            await client
        assert HELLO.config_hash.encode() not in ours.stream.written

    run(main())


def test_a_stranger_gets_little_time_and_little_memory(monkeypatch: pytest.MonkeyPatch, folders: Folders) -> None:
    monkeypatch.setattr(handshake, "TIMEOUT", 0.2)

    async def slow(send: Callable[[Channel], Coroutine[Any, Any, None]], peer: Handshake) -> None:
        ours, theirs = await line()
        waiting = asyncio.create_task(answer(peer, theirs))
        begin = time.monotonic()
        await send(ours)
        with pytest.raises(PeerUnreachable, match="within"):
            await waiting
        assert time.monotonic() - begin < 2

    async def knock_only(channel: Channel) -> None:
        assert isinstance((await channel.call(Message(knock(folders)))).body, pb.Proof)

    async def main() -> None:
        for peer in (member("bob", folders.founder), member("bob")):
            await slow(lambda channel: asyncio.sleep(0), peer)
            await slow(lambda channel: channel.stream.send(b"\x01", patience=1), peer)
        await slow(knock_only, member("bob", folders.founder))
        ours, theirs = await line()
        await ours.stream.send((5000).to_bytes(4, "little") + bytes(8), patience=1)  # and nothing of the 5000 bytes
        with pytest.raises(NotAMember):
            await answer(member("bob", folders.founder), theirs)
        ours, theirs = await line()
        client = asyncio.create_task(call(member("alice", folders.user), ours))
        while not client.done():
            await theirs.send(Message(pb.Working()))
            await asyncio.sleep(0.05)
        with pytest.raises(PeerUnreachable, match="proved nothing within"):
            await client

    run(main())


def test_macs_are_of_one_purpose() -> None:
    secret = SwarmSecret(bytes(32))
    assert secret.mac("a", b"bc") != secret.mac("b", b"bc")
    assert secret.mac("a", b"bc") != secret.mac("a", b"b", b"c")
    with pytest.raises(ValueError, match="32 bytes"):
        SwarmSecret(b"short")


def knock(folders: Folders) -> pb.Knock:
    """alice's, at bob's."""
    said = pb.Knock(nonce=bytes(32))
    said.mac = folders.user.secret.mac("stream", b"knock", b"alice", b"bob", said.nonce, b"", b"")
    return said
