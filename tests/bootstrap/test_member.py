"""Members of a swarm on loopback: joining, talking, losing p2pd, leaving, and leaving nothing behind."""

import asyncio
import functools
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import base58
import psutil
import pytest
import uvloop
from hivemind.dht.protocol import DHTProtocol
from hivemind.p2p import P2P

from bootstrap.daemon import Daemon
from bootstrap.identity import Identity
from bootstrap.member import Member, MemberOptions, quiet_hivemind
from protocol.errors import BadUsage, PeerUnreachable
from protocol.stream import Stream
from tests.tools.members import HASH, SOMEBODY, member, record
from tests.tools.swarm import ForkServer, wait_for_line

MIB = 2**20
ROOT = Path(__file__).parents[2]


def leftovers() -> set[str]:
    """p2pd processes of ours, and files of theirs and ours in /tmp."""
    children = {f"{child.name()} {child.pid}" for child in psutil.Process().children(recursive=True)}
    files = {path for prefix in ("hivetune", "hivemind") for path in Path("/tmp").glob(f"{prefix}-{os.getpid()}-*")}
    return {text for text in children if "p2pd" in text} | set(map(str, files))


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix/tmp/hivemind-{os.getpid()}-")
    before = leftovers()  # other tests' models in this process may still be members for a few seconds
    yield
    assert leftovers() <= before


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# Joining


@pytest.mark.parametrize("carrier", ["libp2p", "direct"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_stream_echo_between_members(run, carrier):
    async def main() -> None:
        async with (
            member() as founder,
            member(*founder.addresses, direct_port=0) as peer,
            member(*founder.addresses, client_mode=True) as client,
        ):
            assert client.addresses == []
            await peer.transport.serve(echo)
            assert await peer.directory.announce(record(peer, direct=peer.door), 60)
            for caller in (client, founder):
                await caller.directory.peers(HASH)
                await asyncio.wait_for(exchange(caller, peer.peer_id), 20)

    async def echo(stream: Stream) -> None:
        assert stream.remote != ""
        for _ in range(8):
            await stream.send(await stream.receive(MIB, 10), patience=10)

    async def exchange(client: Member, peer_id: str) -> None:
        stream = await client.transport.connect(peer_id, carrier)
        data = os.urandom(8 * MIB)
        sending = asyncio.create_task(stream.send(data, patience=10))
        assert await stream.receive(len(data), 10) == data
        await sending
        stream.close()

    run(main())


def test_uvloop_in_a_background_thread():
    results = []

    async def main() -> None:
        async with member() as founder, member(*founder.addresses) as peer:
            results.append((founder.peer_id in founder.addresses[0], await peer.directory.peers(HASH)))

    thread = threading.Thread(target=lambda: uvloop.run(main()))
    thread.start()
    thread.join(20)
    assert results == [(True, [])]


def test_addresses_can_be_joined(tmp_path: Path):
    identity = Identity.load_or_create(tmp_path / "peer.id")
    identity.close()
    port = free_port()

    async def main() -> None:
        async with member(host="0.0.0.0", port=port, identity_path=identity.path) as founder:
            assert founder.peer_id == identity.peer_id
            assert all(address.endswith(f"/tcp/{port}/p2p/{founder.peer_id}") for address in founder.addresses)
            assert not any("0.0.0.0" in address for address in founder.addresses)
            shown = [address for address in founder.addresses if "127.0.0.1" in address]
            assert shown in ([], founder.addresses)
            async with member(*founder.addresses):
                pass
        async with member(port=port, announce_addresses=("/ip4/192.0.2.7/tcp/5",)) as announced:
            assert announced.addresses == [f"/ip4/192.0.2.7/tcp/5/p2p/{announced.peer_id}"]

    asyncio.run(main())


def test_one_initial_peer_of_several_is_enough():
    dead = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{SOMEBODY}"

    async def main() -> None:
        async with member() as founder, member(dead, *founder.addresses) as peer:
            assert await peer.directory.peers(HASH) == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "options",
    [
        MemberOptions(initial_peers=("192.0.2.1:31337",)),
        MemberOptions(initial_peers=("/ip4/192.0.2.1/tcp/1",)),
        MemberOptions(host="nowhere"),
        MemberOptions(port=70000),
        MemberOptions(announce_addresses=("hello",)),
        MemberOptions(host="192.0.2.77"),
        MemberOptions(identity_path=Path("/nowhere/peer.id")),
    ],
)
def test_bad_options(options: MemberOptions):
    with pytest.raises(BadUsage) as caught:
        asyncio.run(Member.join(options))
    assert "\n" not in str(caught.value)


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(BadUsage, match="already in use"):
        asyncio.run(Member.join(MemberOptions(host="127.0.0.1", port=server.getsockname()[1])))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_is_one_members(host: str):
    port = free_port()

    async def main() -> None:
        for _ in range(2):  # the second time it has just been left
            async with member(host=host, port=port) as founder, member(*founder.addresses, host=host):
                with pytest.raises(BadUsage, match=f"^Cannot listen on {host}, port {port}: Address already in use.$"):
                    await Member.join(MemberOptions(host=host, port=port))
                async with member(*founder.addresses, port=port, client_mode=True):
                    pass

    asyncio.run(main())


@pytest.mark.parametrize("client_mode", [False, True])
def test_nobody_listens(client_mode: bool):
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{SOMEBODY}"
    begin = time.monotonic()
    with pytest.raises(PeerUnreachable) as caught:
        asyncio.run(Member.join(MemberOptions((address,), host="127.0.0.1", client_mode=client_mode)))
    assert time.monotonic() - begin < 5
    assert address in str(caught.value)
    assert "connection refused" in str(caught.value)


def test_initial_peer_is_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bootstrap.member.JOIN_TIMEOUT", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}/p2p/{SOMEBODY}"
        begin = time.monotonic()
        with pytest.raises(PeerUnreachable, match=SOMEBODY):
            asyncio.run(Member.join(MemberOptions((address,), host="127.0.0.1")))
        assert time.monotonic() - begin < 4


def test_initial_peer_has_another_identity():
    async def main() -> None:
        async with member() as founder:
            wrong = founder.addresses[0].replace(founder.peer_id, SOMEBODY)
            with pytest.raises(PeerUnreachable, match="peer id mismatch"):
                await Member.join(MemberOptions((wrong,), host="127.0.0.1"))

    asyncio.run(main())


def test_clocks_differ(monkeypatch: pytest.MonkeyPatch):
    honest = DHTProtocol.rpc_ping

    @functools.wraps(honest)
    async def ahead(self, request, context):
        response = await honest(self, request, context)
        response.dht_time += 60
        return response

    async def main() -> None:
        async with member() as founder:
            with pytest.raises(PeerUnreachable, match="clock"):
                await Member.join(MemberOptions(tuple(founder.addresses), host="127.0.0.1"))

    monkeypatch.setattr(DHTProtocol, "rpc_ping", ahead)
    asyncio.run(main())


def test_cancelled_while_joining():
    async def main() -> None:
        async with member() as founder:
            founders_own = leftovers()
            for delay in (0.0, 0.02, 0.1, 0.2, 0.3):
                joining = asyncio.create_task(Member.join(MemberOptions(tuple(founder.addresses), host="127.0.0.1")))
                await asyncio.sleep(delay)
                joining.cancel()
                results = await asyncio.gather(joining, return_exceptions=True)
                if isinstance(results[0], Member):
                    await results[0].shutdown()
                assert leftovers() <= founders_own

    asyncio.run(main())


# Losing p2pd


def test_calls_fail_when_p2pd_dies():
    async def main() -> None:
        async with member() as founder, member(*founder.addresses) as peer:
            os.kill(founder.daemon_process_id, signal.SIGSTOP)
            await asyncio.sleep(0.2)  # until all of its threads stand still
            pending = [
                asyncio.create_task(peer.directory.peers(HASH)),
                asyncio.create_task(peer.transport.connect(founder.peer_id)),
            ]
            await asyncio.sleep(0.3)
            assert [task for task in pending if task.done()] == []
            assert not peer.lost.is_set()
            os.kill(peer.daemon_process_id, signal.SIGKILL)
            begin = time.monotonic()
            results = await asyncio.gather(*pending, return_exceptions=True)
            assert [type(result) for result in results] == [PeerUnreachable, PeerUnreachable]
            assert peer.lost.is_set()
            for call in (peer.directory.peers(HASH), peer.directory.models(), peer.transport.connect(founder.peer_id)):
                with pytest.raises(PeerUnreachable):
                    await call
            await peer.shutdown()
            assert time.monotonic() - begin < 1
            os.kill(founder.daemon_process_id, signal.SIGCONT)

    asyncio.run(main())


def test_what_is_discovered_is_kept_within_bounds():
    """Whoever knows a swarm's secret may announce anything: members that answer and those that were named stay."""

    def address(number: int) -> str:
        return f"/ip4/127.0.0.1/tcp/1/p2p/{base58.b58encode(bytes([0x12, 0x20]) + number.to_bytes(32, 'big')).decode()}"

    async def main() -> None:
        async with member() as founder, member(*founder.addresses) as peer, member(*peer.addresses) as third:
            neighbours = third._neighbours
            neighbours.add(founder.addresses)
            for number in range(200):
                neighbours.add([address(number)])
            kept = set(map(str, neighbours._initial))
            assert len(kept) == 64
            assert {founder.peer_id, peer.peer_id} < kept
            assert address(199).endswith(tuple(kept)), "what does not answer gives way to what is heard later"

    asyncio.run(main())


def test_an_answer_to_a_call_that_has_just_been_cancelled(monkeypatch: pytest.MonkeyPatch):
    feed = asyncio.StreamReader.feed_data

    async def main() -> None:
        async with member() as founder, member(*founder.addresses) as peer:
            control = peer._p2p._client.control
            ours = control._read_task.get_coro().cr_frame.f_locals["reader"]

            def feed_and_cancel(reader: asyncio.StreamReader, data: bytes) -> None:
                feed(reader, data)
                if reader is ours:  # the answer is here, and has not been read
                    for call in control._pending_calls.values():
                        call.cancel()

            ping = peer._node.protocol.call_ping
            monkeypatch.setattr(asyncio.StreamReader, "feed_data", feed_and_cancel)
            with pytest.raises(asyncio.CancelledError):
                await ping(founder._p2p.peer_id)
            monkeypatch.undo()
            assert await asyncio.wait_for(ping(founder._p2p.peer_id), 5) == founder._node.node_id

    asyncio.run(main())


def test_a_stopped_p2pd_is_killed():
    async def main() -> None:
        async with member() as founder:
            os.kill(founder.daemon_process_id, signal.SIGSTOP)
            begin = time.monotonic()
            await founder.shutdown()
            assert time.monotonic() - begin < 2
            assert not psutil.pid_exists(founder.daemon_process_id)

    asyncio.run(main())


# Leaving


def test_shutdown_is_quick_and_idempotent():
    async def main() -> None:
        async with member() as founder:
            assert os.getsid(founder.daemon_process_id) != os.getsid(0), "Ctrl-C would end p2pd before us"
            begin = time.monotonic()
            await asyncio.gather(founder.shutdown(), founder.shutdown())
            await founder.shutdown()
            assert time.monotonic() - begin < 2
            assert not psutil.pid_exists(founder.daemon_process_id)
            assert not founder.lost.is_set()
            with pytest.raises(PeerUnreachable):
                await founder.directory.peers(HASH)

    asyncio.run(main())


MEMBER_PROCESS = """
import asyncio
from bootstrap.member import Member, MemberOptions
async def main():
    member = await Member.join(MemberOptions(host="127.0.0.1"))
    await member.transport.serve(lambda stream: asyncio.sleep(99))
    print(member.daemon_process_id, flush=True)
    await asyncio.sleep(99)
asyncio.run(main())
"""


def test_p2pd_does_not_outlive_a_killed_process(fork_server: ForkServer, tmp_path: Path):
    (tmp_path / "member.py").write_text(MEMBER_PROCESS)
    owner = psutil.Process(fork_server.start([], tmp_path / "out", tmp_path / "err", script=tmp_path / "member.py"))
    try:
        daemon = psutil.Process(int(wait_for_line(tmp_path / "out", 0)))
        assert daemon.is_running()
    finally:
        owner.kill()
    gone, _ = psutil.wait_procs([daemon], timeout=5)
    assert gone


def test_p2pd_does_not_wait_for_ever_for_its_owner(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        daemon = await Daemon.start(["-hostAddrs=/ip4/127.0.0.1/tcp/0"], 5)
        await asyncio.wait_for(daemon.gone.wait(), 5)
        await daemon.stop()

    monkeypatch.setattr("bootstrap.daemon.IDLE_TIMEOUT", 1)
    asyncio.run(main())


def test_hivemind_logs_through_ours(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    quiet_hivemind()
    logger = logging.getLogger("hivemind.dht.node")
    logger.info("information")
    logger.warning("warning")
    assert caplog.messages == ["warning"]
    assert capfd.readouterr().err == ""
    assert logging.getLevelName(logging.WARNING) == "WARNING"
