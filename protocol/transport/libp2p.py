"""The libp2p carrier: raw binary streams through hivemind's p2pd (NAT traversal, relays, encryption, identities)."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from hivemind.p2p import P2P, P2PDaemonError, PeerID

from protocol.errors import PeerUnreachable
from protocol.transport.base import CHUNK, Buffer, Handler, Stream

PROTOCOL_NAME = "swarmtune.stream.1"
_SMALL = 2**16
"""Bytes that are copied sooner than written in parts."""
_BROKEN = (OSError, EOFError, P2PDaemonError, RuntimeError)


class LibP2PStream:
    """A `Stream` over a socket pair that p2pd relays to the remote."""

    def __init__(self, remote: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.remote = remote
        self._reader = reader
        self._writer = writer

    async def send(self, *buffers: Buffer, patience: float | None) -> None:
        """See `Stream.send`."""
        try:
            for buffer in _joined(buffers):
                view = memoryview(buffer)
                for start in range(0, len(view), CHUNK):
                    self._writer.write(view[start : start + CHUNK])
                    async with asyncio.timeout(patience):
                        await self._writer.drain()
        except TimeoutError as error:
            raise PeerUnreachable(f"Peer {self.remote} took nothing for {patience:g} s.") from error
        except _BROKEN as error:
            raise PeerUnreachable(f"The connection to peer {self.remote} broke while sending.") from error

    async def receive(self, count: int, patience: float | None) -> bytearray:
        """See `Stream.receive`."""
        data = bytearray()  # grows as bytes come: `count` is no more than what the other end says
        try:
            while len(data) < count:
                async with asyncio.timeout(patience):
                    part = await self._reader.read(min(count - len(data), CHUNK))
                if not part:
                    raise EOFError
                data += part
        except TimeoutError as error:
            raise PeerUnreachable(f"Peer {self.remote} was silent for {patience:g} s.") from error
        except _BROKEN as error:
            raise PeerUnreachable(f"The connection to peer {self.remote} was closed by the other end.") from error
        return data

    def close(self) -> None:
        """See `Stream.close`."""
        self._writer.close()


def _joined(buffers: Sequence[Buffer]) -> Sequence[Buffer]:
    """Small buffers as one: every write is a system call here and a wake-up of p2pd."""
    if len(buffers) > 1 and sum(memoryview(buffer).nbytes for buffer in buffers) <= _SMALL:
        return (b"".join(buffers),)
    return buffers


class LibP2PTransport:
    """A `Transport` over a running p2pd."""

    def __init__(self, p2p: P2P):
        self._p2p = p2p
        self._open = set[Stream]()

    async def connect(self, peer_id: str) -> Stream:
        """See `Transport.connect`."""
        try:
            target = PeerID.from_base58(peer_id)
            _, reader, writer = await self._p2p.call_binary_stream_handler(target, PROTOCOL_NAME)
        except (*_BROKEN, ValueError) as error:
            raise PeerUnreachable(f"Peer {peer_id} cannot be reached: {error}") from error
        return LibP2PStream(peer_id, reader, writer)

    async def serve(self, handler: Handler) -> None:
        """See `Transport.serve`."""

        async def accept(info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = LibP2PStream(info.peer_id.to_base58(), reader, writer)  # type: ignore[attr-defined]
            self._open.add(stream)
            # As the process ends, its tasks are cancelled; of a cancelled one of these asyncio prints a traceback.
            with suppress(asyncio.CancelledError):
                try:
                    await handler(stream)
                finally:
                    self._open.discard(stream)
                    stream.close()

        await self._p2p.add_binary_stream_handler(PROTOCOL_NAME, accept)

    async def stop_serving(self) -> None:
        """See `Transport.stop_serving`."""
        await self._p2p.remove_binary_stream_handler(PROTOCOL_NAME)
        for stream in list(self._open):
            stream.close()
