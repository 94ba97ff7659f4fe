"""Which carrier a stream takes: directly where that works, by libp2p where it does not, without being asked."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import transformers
import uvloop

from bootstrap.member import Member
from client.swarm.swarm import Swarm as Network
from protocol.errors import BadUsage, PeerUnreachable
from protocol.stream import Carrier, Stream
from protocol.transport import direct
from protocol.transport.carriers import HEAD_START
from protocol.transport.socket_stream import SocketStream
from tests.tools.arena import assert_close, batch, step, with_adapter
from tests.tools.members import HASH, member, record
from tests.tools.swarm import Swarm


def is_direct(stream: Stream) -> bool:
    assert isinstance(stream, SocketStream)
    assert stream._transport is not None
    return stream._transport.get_extra_info("ssl_object") is not None


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive(3, None), patience=5)
    except PeerUnreachable:
        return


async def works(stream: Stream) -> None:
    await stream.send(b"abc", patience=5)
    assert await stream.receive(3, 5) == b"abc"


@asynccontextmanager
async def two_members() -> AsyncIterator[tuple[Member, Member]]:
    """A peer that echoes, and a client that has read of it in the directory."""
    async with member(direct_port=0) as peer, member(*peer.addresses, client_mode=True) as client:
        await peer.transport.serve(echo)
        assert await peer.directory.announce(record(peer, direct=peer.door), 60)
        [found] = await client.directory.peers(HASH)
        assert found.direct == peer.door
        yield peer, client


@pytest.mark.parametrize("wrong", ["a closed port", "a port that says nothing", "another's"])
def test_a_door_that_leads_nowhere_is_passed_by(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left alone for a while, unless the peer announces another."""
    monkeypatch.setattr(direct, "CALL_TIMEOUT", 1.0)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            async with two_members() as (peer, client):
                assert peer.door is not None
                changes = {
                    "a closed port": {"addresses": (closed.getsockname(),)},
                    "a port that says nothing": {"addresses": (silent.getsockname(),)},
                    "another's": {"fingerprint": "0" * 64},
                }[wrong]
                door = peer.door.model_copy(update=changes)
                for attempt in range(2):
                    client.transport.learn(record(peer, direct=door, sessions=attempt))
                    begin = time.monotonic()
                    stream = await client.transport.connect(peer.peer_id)
                    assert time.monotonic() - begin < (HEAD_START if attempt else 1.5)
                    assert not is_direct(stream)
                    await works(stream)
                with pytest.raises(PeerUnreachable, match="cannot be reached directly"):
                    await client.transport.connect(peer.peer_id, "direct")
                client.transport.learn(record(peer, direct=peer.door))
                stream = await client.transport.connect(peer.peer_id)
                assert is_direct(stream)
                await works(stream)

    uvloop.run(main())


def test_a_peer_without_a_door() -> None:
    async def main() -> None:
        async with two_members() as (peer, client):
            client.transport.learn(record(peer))
            assert not is_direct(await client.transport.connect(peer.peer_id))
            with pytest.raises(PeerUnreachable, match="has announced no address"):
                await client.transport.connect(peer.peer_id, "direct")

    uvloop.run(main())


def test_direct_streams_survive_our_p2pd() -> None:
    """Streams that are open go on also when the member that has lost its swarm is shut down, to join anew."""

    async def main() -> None:
        async with two_members() as (peer, client):
            stream = await client.transport.connect(peer.peer_id)
            os.kill(client.daemon_process_id, signal.SIGKILL)
            await asyncio.wait_for(client.lost.wait(), 5)
            await works(stream)
            await works(await client.transport.connect(peer.peer_id))
            await client.shutdown()
            await works(stream)
            stream.close()

    uvloop.run(main())


@pytest.mark.parametrize("carrier", ["libp2p", "direct"])
def test_streams_end_when_a_peer_serves_no_more(carrier: Carrier) -> None:
    async def main() -> None:
        async with two_members() as (peer, client):
            stream = await client.transport.connect(peer.peer_id, carrier)
            await works(stream)
            await peer.transport.stop_serving()
            with pytest.raises(PeerUnreachable):
                await stream.receive(1, 5)
            with pytest.raises(PeerUnreachable):
                await works(await client.transport.connect(peer.peer_id, carrier))

    uvloop.run(main())


@pytest.mark.parametrize("carrier", ["libp2p", "direct"])
def test_streams_end_when_a_client_leaves(carrier: Carrier) -> None:
    async def main() -> None:
        async with two_members() as (peer, client):
            stream = await client.transport.connect(peer.peer_id, carrier)
            receiving = asyncio.create_task(stream.receive(1, None))
            await asyncio.sleep(0)
            await client.shutdown()
            with pytest.raises(PeerUnreachable):
                await asyncio.wait_for(receiving, 5)

    uvloop.run(main())


# With a model


def idle_streams(network: Network) -> list[Stream]:
    return [channel.stream for channels in network.connections._idle.values() for channel in channels]


@pytest.mark.parametrize("carrier", ["libp2p", "direct", "auto"])
def test_the_same_tokens_and_gradients_by_either(carrier: Carrier, llama_swarm: tuple[Path, Swarm]) -> None:
    path, swarm = llama_swarm
    local = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    model = swarm.connect(path, carrier=carrier)
    assert torch.equal(model.generate(**batch()), local.generate(**batch()))
    assert_close(step(with_adapter(model)), step(with_adapter(local)))
    streams = idle_streams(model.swarm.network)
    assert streams
    assert {is_direct(stream) for stream in streams} == {carrier != "libp2p"}


def test_peers_whose_doors_are_blocked_are_used_by_libp2p(swarm: Swarm, models: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = ("--announce-direct", f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}")
        swarm.serve(models("llama"), "0:5", options=options)
        model = swarm.connect(models("llama"))
        local = transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()
        assert torch.equal(model.generate(**batch()), local.generate(**batch()))
        assert_close(step(with_adapter(model)), step(with_adapter(local)))
        assert not any(map(is_direct, idle_streams(model.swarm.network)))


def test_a_carrier_that_is_none(llama_swarm: tuple[Path, Swarm]) -> None:
    path, swarm = llama_swarm
    with pytest.raises(BadUsage, match="Option carrier of the swarm: Input should be 'auto', 'direct' or 'libp2p'"):
        swarm.connect(path, carrier="grpc")
