"""libp2p and direct streams between two processes on loopback, in turn: `python -m benchmarks.carriers`.

Round trips through `Channel`, both ends on uvloop, encrypted by either carrier. GB/s: bytes of the tensor there and
back, over the time. CPU: seconds of all processes, both p2pd among them, which other work on the machine disturbs less.
Copies: how often a received byte is copied between the socket (decrypted) and the tensor, measured at one end; in
sending, a tensor's bytes are handed to the socket or to TLS as they lie.
"""

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
import uvloop

from bootstrap.member import Member, MemberOptions
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import SwarmError
from protocol.records import ModelId, PeerRecord, Speed
from protocol.stream import Carrier, Stream
from protocol.tensors import Limits
from protocol.transport import socket_stream
from protocol.transport.socket_stream import SocketStream

HASH = "0" * 32
CARRIERS: tuple[Carrier, ...] = ("libp2p", "direct")
SHAPES = {"4 KiB": ((2, 1024), 200), "28 KiB": ((14, 1024), 200), "1 MiB": ((512, 1024), 40)}
"""Shapes in bfloat16, and how many round trips."""
LARGE, LARGE_TRIPS = (4, 1024, 1024), 20


@dataclass
class Copies:
    """Bytes that `SocketStream` copied while it received."""

    total: int = 0


@contextmanager
def counting_copies() -> Iterator[Copies]:
    """Counts while the block runs."""
    copies, enlarge = Copies(), socket_stream._enlarged
    take, take_ahead = SocketStream._take, SocketStream._take_ahead

    def counted_take(self: SocketStream, count: int) -> bytearray:
        copies.total += count
        return take(self, count)

    def counted_take_ahead(self: SocketStream) -> None:
        before = self._filled
        take_ahead(self)
        copies.total += self._filled - before

    def counted_enlarge(data: bytearray, size: int) -> bytearray:
        copies.total += len(data)
        return enlarge(data, size)

    SocketStream._take, SocketStream._take_ahead = counted_take, counted_take_ahead  # type: ignore[method-assign]
    socket_stream._enlarged = counted_enlarge
    try:
        yield copies
    finally:
        SocketStream._take, SocketStream._take_ahead = take, take_ahead  # type: ignore[method-assign]
        socket_stream._enlarged = enlarge


def record(peer: Member) -> PeerRecord:
    """What the peer announces, for the caller to find its door."""
    model = ModelId(name="none", config_hash=HASH, num_blocks=1)
    return PeerRecord(
        peer_id=peer.peer_id, model=model, start=0, end=1, dtype="bfloat16", quantization="none", direct=peer.door,
        speed=Speed(decode=1, forward=1), free_cache_tokens=0, max_length=1, version="0",
    )  # fmt: skip


async def echo(stream: Stream) -> None:
    """Send back what comes."""
    channel = Channel(stream, Limits(), 30)
    try:
        while True:
            await channel.send(await channel.receive_request())
    except SwarmError:
        return


async def serve() -> None:
    """The process of the peer."""
    peer = await Member.join(MemberOptions(host="127.0.0.1", direct_port=0))
    await peer.transport.serve(echo)
    await peer.directory.announce(record(peer), 300)
    print(peer.addresses[0], flush=True)
    await asyncio.Event().wait()


async def time_trips(channels: dict[Carrier, Channel], shape: tuple[int, ...], trips: int) -> dict[Carrier, float]:
    """Seconds of a round trip of a tensor, median; the carriers take turns."""
    tensor = torch.randn(shape).bfloat16()
    times: dict[Carrier, list[float]] = {carrier: [] for carrier in channels}
    for _ in range(trips):
        for carrier, channel in channels.items():
            begin = time.perf_counter()
            answer = await channel.call(Message(pb.Ping(), {"x": tensor}))
            times[carrier].append(time.perf_counter() - begin)
            assert answer.tensor("x").shape == tensor.shape
    return {carrier: statistics.median(each) for carrier, each in times.items()}


def cpu_seconds() -> float:
    """Of this process and all below it so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(each.user + each.system for each in times)


async def measure(address: str) -> None:
    """Measure and print a Markdown table."""
    member = await Member.join(MemberOptions((address,), client_mode=True))
    [peer] = await member.directory.peers(HASH)
    channels = {
        carrier: Channel(await member.transport.connect(peer.peer_id, carrier), Limits(), 30) for carrier in CARRIERS
    }
    print(f"| figure | {' | '.join(CARRIERS)} |\n|---|---|---|")
    for name, (shape, trips) in SHAPES.items():
        times = await time_trips(channels, shape, trips)
        print(f"| round trip of {name}, ms | {' | '.join(f'{1e3 * times[each]:.2f}' for each in CARRIERS)} |")
    size = 2 * torch.Size(LARGE).numel()
    times = await time_trips(channels, LARGE, LARGE_TRIPS)
    print(f"| tensor 4x1024x1024 bf16, GB/s | {' | '.join(f'{2e-9 * size / times[each]:.3f}' for each in CARRIERS)} |")
    moved, copied, worked = LARGE_TRIPS * size, [], []
    for carrier in CARRIERS:
        before = cpu_seconds()
        with counting_copies() as copies:
            await time_trips({carrier: channels[carrier]}, LARGE, LARGE_TRIPS)
        worked.append(f"{(cpu_seconds() - before) / (2e-9 * moved):.2f}")
        copied.append(f"{copies.total / moved:.2f}")
    print(f"| the same, CPU s per GB | {' | '.join(worked)} |")
    print(f"| the same, copies of a byte received | {' | '.join(copied)} |")
    await member.shutdown()


def main() -> None:
    """Run both processes."""
    if sys.argv[1:] == ["serve"]:
        uvloop.run(serve())
    command = [sys.executable, "-m", "benchmarks.carriers", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            uvloop.run(measure(process.stdout.readline().strip()))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
