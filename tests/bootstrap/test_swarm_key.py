"""The swarm key by itself: its file, the handshake on streams, the seal on requests. No p2pd, no model."""

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message as ProtoMessage
from hivemind.p2p import PeerID

from bootstrap.key_file import KeyFile, add_key, create_key, drop_old_keys, use_newest_key
from bootstrap.seal import WINDOW, Nonces, Refusal, Refused, Route, SealedRequest, refusal_in
from protocol import handshake
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import BadUsage, PeerFailed, PeerUnreachable, SwarmError, WrongKey
from protocol.handshake import Handshake
from protocol.swarm_key import NO_KEY, OPEN, REFUSED, SwarmKey
from protocol.tensors import Limits
from protocol.transport.socket_stream import SocketStream
from tests.tools.command import Command

OURS, THEIRS, NEW = (SwarmKey(bytes([number]) * 32) for number in (1, 2, 3))
HELLO = pb.Hello(version=1, config_hash="0123456789abcdef" * 2, weights={"model.safetensors": "f" * 32})


# The file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "swarm.key"
    create_key(path)
    return path


def names(path: Path) -> list[str]:
    return [key.id.hex() for key in KeyFile(path).current()]


def test_a_key_file_is_private_and_never_overwritten(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    assert re.fullmatch(r"hivetune-key-1 [\w-]{43} \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n", text)
    with pytest.raises(BadUsage, match="never overwritten"):
        create_key(file)
    assert file.read_text() == text
    assert names(file) != [create_key(file.with_name("other"))]
    assert sorted(path.name for path in file.parent.iterdir()) == ["other", "swarm.key"]


def lines(*keys: str) -> bytes:
    return "".join(f"hivetune-key-1 {key} 2026-01-02T03:04:05Z\n" for key in keys).encode()


SECRET = "A" * 42 + "E"
BAD_FILES = {
    "empty": (b"", "holds 0 swarm keys"),
    "blank": (b"\n  \n", "holds 0 swarm keys"),
    "text": (b"hello\n", "Line 1 of"),
    "no text": (bytes(range(128, 256)), "Line 1 of"),
    "a second line": (lines(SECRET) + b"hello", "Line 2 of"),
    "a short key": (lines(SECRET[1:]), "Line 1 of"),
    "another version": (lines(SECRET).replace(b"key-1", b"key-2"), "Line 1 of"),
    "no date": (f"hivetune-key-1 {SECRET}".encode(), "Line 1 of"),
    "a date that is none": (lines(SECRET).replace(b"-01-", b"-13-"), "Line 1 of"),
    "many keys": (lines(*[SECRET] * 17), "holds 17 swarm keys"),
    "long": (b"\n" * 4096 + lines(SECRET), "over 4096 bytes"),
}


@pytest.mark.parametrize(("content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_key_is_refused_in_one_sentence(file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(BadUsage, match=said) as caught:
        KeyFile(file)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert SECRET[1:] not in str(caught.value)


def test_what_cannot_be_a_key_file(file: Path, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "not a file"),
        (Path("/dev/zero"), "not a file"),
    ):
        with pytest.raises(BadUsage, match=said):
            KeyFile(path)
    file.chmod(0o604)
    with pytest.raises(BadUsage, match=r"every user of this machine; run `chmod 600"):
        KeyFile(file)
    file.chmod(0o640)
    assert len(names(file)) == 1


def test_a_rotation_step_by_step(file: Path) -> None:
    file.chmod(0o640)
    (old,) = names(file)
    for step, said in ((use_newest_key, "one key only"),):
        with pytest.raises(BadUsage, match=said):
            step(file)
    assert drop_old_keys(file) == old
    new = add_key(file)
    assert names(file) == [old, new]
    with pytest.raises(BadUsage, match="rotation is under way"):
        add_key(file)
    with pytest.raises(BadUsage, match="not used yet"):
        drop_old_keys(file)
    for _ in range(2):  # once more does no harm
        assert use_newest_key(file) == new
        assert names(file) == [new, old]
    for _ in range(2):
        assert drop_old_keys(file) == new
        assert names(file) == [new]
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["swarm.key"]


def test_a_changed_file_is_read_again_and_a_broken_one_is_not_taken(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keyring = KeyFile(file)
    (old,) = keyring.current()
    add_key(file)
    assert [key.id for key in keyring.current()][:1] == [old.id]
    assert len(keyring.current()) == 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    good = file.read_bytes()
    for spoil in (lambda: file.write_text("hello"), lambda: file.chmod(0o644), file.unlink):
        caplog.clear()
        spoil()
        for _ in range(3):
            assert len(keyring.current()) == 2
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "goes on with the keys that it has" in caplog.text
    file.write_bytes(good.splitlines()[1])
    file.chmod(0o600)
    assert [key.id for key in keyring.current()] == [KeyFile(file).current()[0].id]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command, file = Command(monkeypatch, capsys), tmp_path / "key"
    for name, said in (("create", "new key"), ("add", "Then: peer key use"), ("use", "Then: peer key drop")):
        outcome = command("key", name, file)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert said in outcome.stdout
        for line in file.read_text().splitlines():
            assert line.split()[1] not in outcome.stdout
    (new, _) = names(file)
    assert command("key", "drop", file).code == 0
    assert names(file) == [new]
    assert "never overwritten" in command("key", "create", file).refusal()
    assert "cannot be read" in command("key", "add", tmp_path / "none").refusal()
    assert "cannot be written" in command("key", "create", tmp_path / "no" / "key").refusal()


# The handshake


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


# The seal on the DHT's requests

ALICE, BOB, MALLORY = (PeerID(b"\x12\x20" + bytes([number]) * 32) for number in (1, 2, 3))
ROUTE = Route("DHTProtocol.rpc_find", ALICE, BOB)
NOW = 1.8e9


def refused(
    data: bytes,
    route: Route = ROUTE,
    keys: tuple[SwarmKey, ...] = (OURS,),
    now: float = NOW,
    seen: Nonces | None = None,
) -> Refusal:
    with pytest.raises(Refused) as caught:
        SealedRequest.open(keys, route, data, now, seen or Nonces())
    assert refusal_in(caught.value.why.to_answer()) == caught.value.why
    return caught.value.why


def test_a_sealed_request_holds_for_one_method_sender_receiver_and_time() -> None:
    data = SealedRequest.seal(OURS, ROUTE, b"request", NOW).to_bytes()
    for now in (NOW - WINDOW, NOW, NOW + WINDOW):
        assert SealedRequest.open((NEW, OURS), ROUTE, data, now, Nonces()).body == b"request"
    for change in ({"method": "DHTProtocol.rpc_store"}, {"sender": MALLORY}, {"receiver": MALLORY}):
        assert refused(data, replace(ROUTE, **change)) is Refusal.WRONG_KEY
    assert refused(data, keys=(THEIRS,)) is Refusal.WRONG_KEY
    for now in (NOW - WINDOW - 1, NOW + WINDOW + 1):
        assert refused(data, now=now) is Refusal.CLOCKS_DIFFER
    for sent in (float("nan"), float("inf")):
        assert refused(SealedRequest.seal(OURS, ROUTE, b"", sent).to_bytes()) is Refusal.CLOCKS_DIFFER


def test_every_byte_of_a_request_counts() -> None:
    data = SealedRequest.seal(OURS, ROUTE, b"request", NOW).to_bytes()
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        assert refused(changed) in (Refusal.NO_KEY, Refusal.WRONG_KEY)
        assert refused(data[:place]) in (Refusal.NO_KEY, Refusal.WRONG_KEY)
    assert refused(data + b"x") is Refusal.WRONG_KEY


def test_a_request_is_taken_once() -> None:
    seen = Nonces()
    ahead = SealedRequest.seal(OURS, ROUTE, b"", NOW + WINDOW).to_bytes()
    SealedRequest.open((OURS,), ROUTE, ahead, NOW, seen)
    for later in (0, 1, WINDOW, 2 * WINDOW):
        assert refused(ahead, now=NOW + later, seen=seen) is Refusal.REPEATED
    assert refused(ahead, now=NOW + 2 * WINDOW + 1, seen=seen) is Refusal.CLOCKS_DIFFER
    for number in range(1000):
        SealedRequest.open(
            (OURS,), ROUTE, SealedRequest.seal(OURS, ROUTE, b"", NOW + number).to_bytes(), NOW + number, seen
        )
    assert len(seen._until) < 3 * WINDOW


def test_an_answer_holds_for_one_request() -> None:
    asked, other = (SealedRequest.seal(OURS, ROUTE, b"request", NOW) for _ in range(2))
    answer = SealedRequest.open((OURS,), ROUTE, asked.to_bytes(), NOW, Nonces()).seal_answer(b"answer")
    assert asked.open_answer(answer) == b"answer"
    for request, data in (
        (other, answer),
        (asked, answer + b"x"),
        (asked, b"answer"),
        (asked, b""),
        (asked, answer[:40]),
    ):
        with pytest.raises(WrongKey, match="does not hold the key"):
            request.open_answer(data)
    with pytest.raises(WrongKey):
        asked.open_answer(asked.to_bytes())


def test_keys_do_not_show() -> None:
    assert repr(OURS) == f"SwarmKey({OURS.id.hex()})"
    assert OURS.mac("a", b"bc") != OURS.mac("b", b"bc")
    assert OURS.mac("a", b"bc") != OURS.mac("a", b"b", b"c")
    with pytest.raises(ValueError, match="32 bytes"):
        SwarmKey(b"short")
