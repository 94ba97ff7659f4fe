"""Bytes that a client sends to peers and receives from them: counted where it writes and reads its streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.stream import Buffer
from protocol.transport.socket_stream import SocketStream


@dataclass
class Traffic:
    """Bytes so far. The directory's own traffic is not among them: it takes another way."""

    sent: int = 0
    received: int = 0


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts while the block runs."""
    traffic, send, receive = Traffic(), SocketStream.send, SocketStream.receive

    async def counted_send(self: SocketStream, *buffers: Buffer, patience: float | None) -> None:
        traffic.sent += sum(memoryview(buffer).nbytes for buffer in buffers)
        await send(self, *buffers, patience=patience)

    async def counted_receive(self: SocketStream, count: int, patience: float | None) -> bytearray:
        data = await receive(self, count, patience)
        traffic.received += len(data)
        return data

    SocketStream.send, SocketStream.receive = counted_send, counted_receive  # type: ignore[method-assign]
    try:
        yield traffic
    finally:
        SocketStream.send, SocketStream.receive = send, receive  # type: ignore[method-assign]
