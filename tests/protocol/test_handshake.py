"""The handshake with which members who hold a swarm key begin their streams. No p2pd, no model."""

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
from google.protobuf.message import Message as ProtoMessage

from protocol import handshake
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import PeerFailed, PeerUnreachable, SwarmError, WrongKey
from protocol.handshake import Handshake
from protocol.swarm_key import NO_KEY, OPEN, REFUSED, SwarmKey
from protocol.tensors import Limits
from protocol.transport.socket_stream import SocketStream
from tests.tools.keys import NEW, OURS, THEIRS

HELLO = pb.Hello(version=1, config_hash="0123456789abcdef" * 2, weights={"model.safetensors": "f" * 32})


@dataclass(frozen=True)
class Ring:
    held: tuple[SwarmKey, ...]

    def current(self) -> tuple[SwarmKey, ...]:
        return self.held


def member(name: str, *keys: SwarmKey) -> Handshake:
    return Handshake(name, Ring(keys) if keys else None)


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
    await caller.initiate(channel)
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


def meet(caller: Handshake, peer: Handshake) -> tuple[Any, Any, Channel, Channel]:
    """What a handshake and a Hello come to at both ends: a message or an error."""

    async def main() -> tuple[Any, Any, Channel, Channel]:
        ours, theirs = await line()
        results = await asyncio.gather(call(caller, ours), answer(peer, theirs), return_exceptions=True)
        ours.close()
        theirs.close()
        return (*results, ours, theirs)

    return run(main())


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 15))


@pytest.mark.parametrize(
    ("callers", "peers", "used"),
    [
        ((), (), b""),
        ((OURS,), (OURS,), OURS.id),
        ((OURS, NEW), (OURS,), OURS.id),
        ((OURS, NEW), (NEW, OURS), OURS.id),
        ((NEW, OURS), (OURS, NEW), NEW.id),
        ((NEW, OURS), (OURS,), OURS.id),
    ],
)
def test_members_meet(callers: tuple[SwarmKey, ...], peers: tuple[SwarmKey, ...], used: bytes) -> None:
    welcome, hello, ours, theirs = meet(member("alice", *callers), member("bob", *peers))
    assert isinstance(welcome, pb.Welcome)
    assert hello == HELLO
    assert (ours.key_id, theirs.key_id) == (used, used)
    assert (ours.limits, theirs.limits) == (Limits(), Limits())


@pytest.mark.parametrize(
    ("callers", "peers", "said"),
    [((), (OURS,), NO_KEY), ((THEIRS,), (OURS,), REFUSED), ((OURS,), (), OPEN), ((OURS,), (NEW,), REFUSED)],
)
def test_strangers_are_refused_and_told_why(
    callers: tuple[SwarmKey, ...], peers: tuple[SwarmKey, ...], said: str
) -> None:
    told, seen, ours, _ = meet(member("alice", *callers), member("bob", *peers))
    assert isinstance(told, WrongKey)
    assert isinstance(seen, WrongKey)
    assert str(told).startswith(said.rstrip("."))
    if callers:
        assert HELLO.config_hash.encode() not in ours.stream.written


REQUESTS = [
    pb.OpenSession(end=1), pb.Step(number=1), pb.ForkSession(), pb.Forward(), pb.Backward(), pb.PutAdapter(),
    pb.ReadWeight(), pb.Factorize(), pb.Ping(), pb.Hello(), pb.Welcome(), pb.Proof(), pb.Knock(), pb.Working(),
    pb.Knock(nonce=bytes(32), keys=[THEIRS.id]),
]  # fmt: skip


@pytest.mark.parametrize("request_body", REQUESTS, ids=lambda body: type(body).__name__)
def test_nothing_may_come_before_the_key(request_body: ProtoMessage) -> None:
    async def main() -> None:
        ours, theirs = await line()
        peer = asyncio.create_task(answer(member("bob", OURS), theirs))
        with pytest.raises(SwarmError):
            await ours.call(Message(request_body))
        with pytest.raises(SwarmError):
            await peer
        assert theirs.key_id == b""

    run(main())


def test_a_handshake_cannot_be_replayed() -> None:
    async def main() -> None:
        ours, theirs = await line()
        await asyncio.gather(call(member("alice", OURS), ours), answer(member("bob", OURS), theirs))
        again, theirs = await line()
        await again.stream.send(ours.stream.written, patience=5)
        with pytest.raises(WrongKey):
            await answer(member("bob", OURS), theirs)
        assert isinstance((await again.receive_answer()).body, pb.Proof)
        with pytest.raises(WrongKey):
            await again.receive_answer()

    run(main())


def test_a_peers_proof_is_no_callers_proof() -> None:
    """Who lacks the key gets a proof from the peer, and sends it back as its own."""

    async def main() -> None:
        ours, theirs = await line()
        peer = asyncio.create_task(answer(member("bob", OURS), theirs))
        proof = (await ours.call(Message(pb.Knock(nonce=bytes(32), keys=[OURS.id])))).body
        await ours.send(Message(proof))
        with pytest.raises(WrongKey):
            await peer

    run(main())


def test_a_handshake_cannot_be_passed_on() -> None:
    """mallory, whom alice calls, shows alice's handshake to bob as her own, and bob's to alice."""

    async def main() -> None:
        alices, mallorys = await line("alice", "mallory")
        to_bob, bobs = await line("mallory", "bob")
        alice = asyncio.create_task(call(member("alice", OURS), alices))
        bob = asyncio.create_task(answer(member("bob", OURS), bobs))
        await to_bob.send(await mallorys.receive_request())
        await mallorys.send(await to_bob.receive_answer())
        with pytest.raises(WrongKey, match="mallory does not hold the key"):
            await alice
        assert HELLO.config_hash.encode() not in alices.stream.written
        to_bob.close()
        with pytest.raises(PeerUnreachable):
            await bob

    run(main())


@pytest.mark.parametrize("reply", [pb.Proof(), pb.Proof(nonce=bytes(32), key=OURS.id, mac=bytes(32)), pb.Welcome()])
def test_a_client_says_nothing_to_a_peer_without_the_key(reply: ProtoMessage) -> None:
    async def main() -> None:
        ours, theirs = await line()
        client = asyncio.create_task(call(member("alice", OURS), ours))
        await theirs.receive_request()
        await theirs.send(Message(reply))
        with pytest.raises(SwarmError):
            await client
        assert HELLO.config_hash.encode() not in ours.stream.written

    run(main())


def test_a_stranger_gets_little_time_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert isinstance((await channel.call(Message(pb.Knock(nonce=bytes(32), keys=[OURS.id])))).body, pb.Proof)

    async def main() -> None:
        for peer in (member("bob", OURS), member("bob")):
            await slow(lambda channel: asyncio.sleep(0), peer)
            await slow(lambda channel: channel.stream.send(b"\x01", patience=1), peer)
        await slow(knock_only, member("bob", OURS))
        ours, theirs = await line()
        await ours.stream.send((5000).to_bytes(4, "little") + bytes(8), patience=1)  # and nothing of the 5000 bytes
        with pytest.raises(WrongKey):
            await answer(member("bob", OURS), theirs)
        ours, theirs = await line()
        client = asyncio.create_task(call(member("alice", OURS), ours))
        while not client.done():
            await theirs.send(Message(pb.Working()))
            await asyncio.sleep(0.05)
        with pytest.raises(PeerUnreachable, match="proved no key within"):
            await client

    run(main())


def test_a_dropped_key_ends_its_streams() -> None:
    _, _, ours, theirs = meet(member("alice", OURS, NEW), member("bob", OURS))
    client, peer = member("alice", NEW, OURS), member("bob", NEW, OURS)
    peer.check_current(theirs)
    assert not client.is_preferred(ours)
    with pytest.raises(PeerFailed, match="open another"):
        member("bob", NEW).check_current(theirs)


def test_keys_do_not_show() -> None:
    assert repr(OURS) == f"SwarmKey({OURS.id.hex()})"
    assert OURS.mac("a", b"bc") != OURS.mac("b", b"bc")
    assert OURS.mac("a", b"bc") != OURS.mac("a", b"b", b"c")
    with pytest.raises(ValueError, match="32 bytes"):
        SwarmKey(b"short")
