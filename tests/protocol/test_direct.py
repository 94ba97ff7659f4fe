"""The direct carrier: who is let in, who is refused, what strangers can hold."""

import asyncio
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvloop

from bootstrap.identity import Identity, signer_of
from protocol.errors import PeerUnreachable
from protocol.records import Door
from protocol.stream import Handler, Stream
from protocol.transport import direct
from protocol.transport.certificate import caller_context
from protocol.transport.direct import MAX_STRANGERS_OF_HOST, DirectCaller, DirectListener
from protocol.transport.introduction import NONCE_BYTES, Credentials

MIB = 2**20
LOOPS = pytest.mark.parametrize("loop", [asyncio.run, uvloop.run])
Loop = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> list[Credentials]:
    """A peer, a caller and a third."""
    folder = tmp_path_factory.mktemp("identities")
    identities = [Identity.load_or_create(folder / str(number)) for number in range(3)]
    return [Credentials(one.peer_id, one.public_key, one.sign, signer_of) for one in identities]


@dataclass
class House:
    """A peer that answers its door with an echo of ten bytes at a time, and notes who came."""

    me: Credentials
    listener: DirectListener
    guests: list[str] = field(default_factory=list)

    @property
    def door(self) -> Door:
        return Door(fingerprint=self.listener.fingerprint, addresses=(("127.0.0.1", self.listener.port),))

    async def echo(self, stream: Stream) -> None:
        self.guests.append(stream.remote)
        try:
            while True:
                await stream.send(await stream.receive(10, None), patience=5)
        except PeerUnreachable:
            return

    async def visit(self, caller: Credentials) -> Stream:
        """A stream of `caller`'s that works."""
        stream = await DirectCaller(caller).connect(self.me.peer_id, self.door)
        data = os.urandom(10)
        await stream.send(data, patience=5)
        assert await stream.receive(10, 5) == data
        return stream


@asynccontextmanager
async def house(me: Credentials, handler: Handler | None = None) -> AsyncIterator[House]:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    home = House(me, DirectListener(me, bound))
    await home.listener.serve(handler or home.echo)
    try:
        async with asyncio.timeout(20):
            yield home
    finally:
        home.listener.close()


# Streams


@LOOPS
def test_both_ends_know_each_other(loop: Loop, people: list[Credentials]) -> None:
    peer, *guests = people

    async def main() -> None:
        async with house(peer) as home:
            for guest in guests:
                assert (await home.visit(guest)).remote == peer.peer_id
            assert home.guests == [guest.peer_id for guest in guests]

    loop(main())


@LOOPS
def test_what_was_sent_last_arrives_from_a_stream_that_was_closed(loop: Loop, people: list[Credentials]) -> None:
    data = os.urandom(3 * MIB)

    async def say_and_go(stream: Stream) -> None:
        await stream.receive(1, 5)
        await stream.send(b"length", data, patience=5)

    async def main() -> None:
        async with house(people[0], say_and_go) as home:
            stream = await DirectCaller(people[1]).connect(home.me.peer_id, home.door)
            await stream.send(b"?", patience=5)
            await asyncio.sleep(0.2)
            assert await stream.receive(6, 5) == b"length"
            assert await stream.receive(len(data), 5) == data
            with pytest.raises(PeerUnreachable, match="closed by the other end"):
                await stream.receive(1, 5)

    loop(main())


@LOOPS
def test_an_end_that_takes_or_says_nothing_is_noticed(loop: Loop, people: list[Credentials]) -> None:
    async def sleep(stream: Stream) -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        async with house(people[0], sleep) as home:
            stream = await DirectCaller(people[1]).connect(home.me.peer_id, home.door)
            for attempt, said in (
                (stream.receive(1, 0.2), "silent"),
                (stream.send(bytes(64 * MIB), patience=0.2), "took"),
            ):
                begin = time.monotonic()
                with pytest.raises(PeerUnreachable, match=said):
                    await attempt
                assert time.monotonic() - begin < 3
            receiving = asyncio.create_task(stream.receive(1, None))
            await asyncio.sleep(0)
            stream.close()
            with pytest.raises(PeerUnreachable):
                await receiving

    loop(main())


@LOOPS
def test_memory_grows_with_what_comes(loop: Loop, people: list[Credentials]) -> None:
    async def say_little(stream: Stream) -> None:
        await stream.send(bytes(2 * MIB), patience=5)
        await stream.receive(1, 5)

    async def main() -> None:
        async with house(people[0], say_little) as home:
            stream = await DirectCaller(people[1]).connect(home.me.peer_id, home.door)
            with pytest.raises(PeerUnreachable):
                await stream.receive(2**50, 0.3)

    loop(main())


# Who is let in


def test_a_door_of_another_is_not_taken_for_the_peers(people: list[Credentials]) -> None:
    """By its certificate; or by what the peer that it is says to one who wants another."""
    peer, caller, third = people

    async def main() -> None:
        async with house(peer) as home:
            calls = DirectCaller(caller)
            with pytest.raises(PeerUnreachable, match="is not the peer"):
                await calls.connect(peer.peer_id, home.door.model_copy(update={"fingerprint": "f" * 64}))
            with pytest.raises(PeerUnreachable, match="closed"):
                await calls.connect(third.peer_id, home.door)
            assert home.guests == []
            await home.visit(caller)

    uvloop.run(main())


@dataclass
class Raw:
    """A connection without an introduction yet."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    nonce: bytes

    @classmethod
    async def open(cls, home: House) -> "Raw":
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", home.listener.port, ssl=caller_context(), server_hostname=""
        )
        return cls(reader, writer, await reader.readexactly(NONCE_BYTES))

    async def is_refused(self, said: bytes) -> bool:
        """Whether nothing comes but the end."""
        self.writer.write(said)
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True
        finally:
            self.writer.close()


def introduction(public_key: bytes, signature: bytes) -> bytes:
    return struct.pack("<HH", len(public_key), len(signature)) + public_key + signature


def test_only_a_fresh_signature_by_the_key_that_is_named_is_an_introduction(people: list[Credentials]) -> None:
    peer, caller, third = people

    async def main() -> None:
        async with house(peer) as home, house(third) as other:
            purpose, fingerprint = b"hivetune direct introduction 1\0", bytes.fromhex(home.listener.fingerprint)

            def sign(nonce: bytes, at: bytes = fingerprint, of: str = peer.peer_id, why: bytes = purpose) -> bytes:
                return caller.sign(why + at + nonce + of.encode())

            raw = await Raw.open(home)
            genuine = introduction(caller.public_key, sign(raw.nonce))
            raw.writer.write(genuine)
            assert await raw.reader.readexactly(1) == b"\x01"
            raw.writer.close()

            elsewhere = bytes.fromhex(other.listener.fingerprint)
            wrong: list[Callable[[bytes], bytes]] = [
                lambda nonce: genuine,  # again
                lambda nonce: introduction(third.public_key, sign(nonce)),
                lambda nonce: introduction(caller.public_key, bytes(256)),
                lambda nonce: introduction(caller.public_key, sign(nonce, at=elsewhere)),
                lambda nonce: introduction(caller.public_key, sign(nonce, of=third.peer_id)),
                lambda nonce: introduction(caller.public_key, sign(nonce, why=b"hivetune record 1\0")),
                lambda nonce: introduction(b"", sign(nonce)),
                lambda nonce: introduction(caller.public_key, b""),
                lambda nonce: struct.pack("<HH", 2**16 - 1, 2**16 - 1),
                lambda nonce: b"GET / HTTP/1.1\r\n\r\n",
            ]
            for said in wrong:
                raw = await Raw.open(home)
                assert await raw.is_refused(said(raw.nonce))
            assert home.guests == [caller.peer_id]
            await home.visit(third)

    uvloop.run(main())


def test_nothing_but_new_tls_is_spoken(people: list[Credentials], caplog: pytest.LogCaptureFixture) -> None:
    old = caller_context()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    async def main() -> None:
        async with house(people[0]) as home:
            reader, writer = await asyncio.open_connection("127.0.0.1", home.listener.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert len(await reader.read()) < NONCE_BYTES  # a TLS alert at most
            writer.close()
            with pytest.raises(OSError):  # noqa: PT011 (which one, depends on the system)
                await asyncio.open_connection("127.0.0.1", home.listener.port, ssl=old, server_hostname="")
            await home.visit(people[1])
            assert len(home.guests) == 1

    uvloop.run(main())
    assert not caplog.records


def test_another_signer_is_nobody(people: list[Credentials]) -> None:
    peer, caller, third = people

    async def main() -> None:
        async with house(peer) as home:
            with pytest.raises(PeerUnreachable):
                await home.visit(replace(caller, sign=third.sign))
            assert home.guests == []

    uvloop.run(main())


# What strangers can hold


def test_strangers_hold_few_connections_and_not_for_long(
    people: list[Credentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "STRANGER_TIMEOUT", 1.0)

    async def main() -> None:
        async with house(people[0]) as home:
            with ExitStack() as stack:
                for _ in range(MAX_STRANGERS_OF_HOST - 1):
                    stack.enter_context(socket.create_connection(("127.0.0.1", home.listener.port)))
                silent = await Raw.open(home)
                assert sum(home.listener._strangers.values()) == MAX_STRANGERS_OF_HOST
                with pytest.raises(PeerUnreachable):
                    await home.visit(people[1])
                assert await silent.reader.read() == b""  # its time is over
                await asyncio.sleep(0.1)
                assert not home.listener._strangers
                await home.visit(people[1])

    uvloop.run(main())


def test_a_stranger_that_trickles_has_no_more_time(people: list[Credentials], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "STRANGER_TIMEOUT", 0.6)

    async def main() -> None:
        async with house(people[0]) as home:
            raw, begin = await Raw.open(home), time.monotonic()
            ended = asyncio.create_task(raw.reader.read())
            while not ended.done() and time.monotonic() - begin < 5:
                raw.writer.write(b"\1")
                await asyncio.sleep(0.1)
            with suppress(ConnectionResetError):  # a byte came after the end
                assert await ended == b""
            assert time.monotonic() - begin < 3
            raw.writer.close()

    uvloop.run(main())


def test_a_full_peer_closes_further_connections(people: list[Credentials], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_STREAMS", 2)

    async def main() -> None:
        async with house(people[0]) as home:
            first, _ = [await home.visit(people[1]) for _ in range(2)]
            with pytest.raises(PeerUnreachable):
                await home.visit(people[1])
            first.close()
            await asyncio.sleep(0.2)
            await home.visit(people[1])

    uvloop.run(main())


def test_many_calls_at_once_wait_for_each_other(people: list[Credentials], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_STRANGERS_OF_HOST", 3)
    monkeypatch.setattr(direct, "_MAX_CALLS", 2)  # the peer may still see one that the caller takes to be done

    async def main() -> None:
        async with house(people[0]) as home:
            calls = DirectCaller(people[1])
            streams = await asyncio.gather(*[calls.connect(home.me.peer_id, home.door) for _ in range(50)])
            assert len(set(map(id, streams))) == 50
            calls.close()
            with pytest.raises(PeerUnreachable):
                await streams[0].receive(1, 5)

    uvloop.run(main())


def test_the_first_address_that_answers_is_taken(people: list[Credentials]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        others = [("127.0.0.1", each.getsockname()[1]) for each in (closed, silent)]

        async def main() -> None:
            async with house(people[0]) as home:
                door = home.door.model_copy(update={"addresses": (*others, *home.door.addresses)})
                begin = time.monotonic()
                (await DirectCaller(people[1]).connect(home.me.peer_id, door)).close()
                assert time.monotonic() - begin < 3

        uvloop.run(main())
