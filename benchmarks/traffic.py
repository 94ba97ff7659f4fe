"""Bytes that a client sends to peers and receives from them: counted where it writes and reads its streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.transport.base import Buffer
from protocol.transport.libp2p import LibP2PStream


@dataclass
class Traffic:
    """Bytes so far. The directory's own traffic is not among them: it takes another way."""

    sent: int = 0
    received: int = 0


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts while the block runs."""
    traffic, send, receive = Traffic(), LibP2PStream.send, LibP2PStream.receive

    async def counted_send(self: LibP2PStream, *buffers: Buffer, patience: float | None) -> None:
        traffic.sent += sum(memoryview(buffer).nbytes for buffer in buffers)
        await send(self, *buffers, patience=patience)

    async def counted_receive(self: LibP2PStream, count: int, patience: float | None) -> bytearray:
        data = await receive(self, count, patience)
        traffic.received += len(data)
        return data

    LibP2PStream.send, LibP2PStream.receive = counted_send, counted_receive  # type: ignore[method-assign]
    try:
        yield traffic
    finally:
        LibP2PStream.send, LibP2PStream.receive = send, receive  # type: ignore[method-assign]
