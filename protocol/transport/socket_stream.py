"""A `Stream` over any transport of asyncio's: a socket to p2pd, a TLS connection to a peer."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from protocol.errors import PeerUnreachable
from protocol.stream import CHUNK, Buffer

_SMALL = 2**16
"""Buffers of up to so many bytes together are copied into one and written at once."""
_AHEAD = 2**18
"""Bytes that are read before anyone asks for them. Not less than asyncio decrypts of a socket at once: it drops what it
cannot hand over by the time that the other end closes."""
_LARGE = 2**16
"""From so many missing bytes on, a `receive` has them read right into its memory, without a copy."""
_FIRST, _GROWTH = 2**20, 8
"""Bytes of memory that a `receive` begins with, and the factor by which it grows whenever that is full."""
_MAX_UNSENT = 2**18
_NOTHING = memoryview(bytearray())


class SocketStream(asyncio.BufferedProtocol):
    """A `Stream` whose bytes are read, and decrypted, right into the memory that `receive` returns."""

    def __init__(self, remote: str = ""):
        self.remote = remote
        """The remote's peer ID. The maker of the stream sets it before others use the stream."""
        self._transport: asyncio.Transport | None = None
        self._owner: object = None
        self._ahead, self._start, self._end = bytearray(_AHEAD), 0, 0
        self._target = _NOTHING
        """The memory that a `receive` waits to be filled; its first `_filled` bytes are there."""
        self._filled = 0
        self._into_target = False
        """Whether the transport was last given a part of `_target` to read into."""
        self._is_paused = False
        self._last_arrival = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._is_over = False
        """Whether nothing more will come."""
        self._is_broken = False
        """Whether nothing more can be written."""

    @classmethod
    async def adopt(cls, remote: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> "SocketStream":
        """Take over the connection of `reader` and `writer`, with what `reader` has read; neither may be used then."""
        stream, transport = cls(remote), cast(asyncio.Transport, writer.transport)
        transport.pause_reading()
        reader.feed_eof()
        pending = await reader.read()
        stream._ahead, stream._end = bytearray(pending).ljust(_AHEAD, b"\0"), len(pending)
        stream._owner = writer  # closes the connection when it is collected
        transport.set_protocol(stream)
        stream.connection_made(transport)
        if transport.is_closing():
            stream.connection_lost(None)
        else:
            transport.resume_reading()
        return stream

    @property
    def available(self) -> int:
        """See `Stream.available`."""
        return self._end - self._start

    async def send(self, *buffers: Buffer, patience: float | None) -> None:
        """See `Stream.send`."""
        try:
            for buffer in _joined(buffers):
                view = memoryview(buffer)
                for start in range(0, len(view), CHUNK):
                    await self._write(view[start : start + CHUNK], patience)
        except TimeoutError as error:
            raise PeerUnreachable(f"Peer {self.remote} took nothing for {patience:g} s.") from error

    async def receive(self, count: int, patience: float | None) -> bytearray:
        """See `Stream.receive`."""
        if count <= self._end - self._start:
            return self._take(count)
        # Memory grows as bytes come: `count` is only what the other end claims.
        data, filled = bytearray(min(count, _FIRST)), 0
        while True:
            await self._fill(memoryview(data), filled, patience)
            if len(data) == count:
                return data
            filled = len(data)
            data = _enlarged(data, min(count, _GROWTH * filled))

    def close(self) -> None:
        """See `Stream.close`."""
        self._end_reading(broken=True)
        if self._transport is not None:
            self._transport.close()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_MAX_UNSENT)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        self._into_target = len(self._target) - self._filled >= _LARGE
        if self._into_target:
            return self._target[self._filled :]
        if self._is_broken:  # bytes that come after `close` are dropped
            self._start = self._end = 0
        return memoryview(self._ahead)[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._last_arrival = asyncio.get_running_loop().time()
        if self._into_target:
            self._filled += nbytes
        else:
            self._end += nbytes
            self._take_ahead()
        if self._filled == len(self._target):
            self._wake()
        if self._end == len(self._ahead) and not self._is_broken and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """See `asyncio.BufferedProtocol`; the transport then closes itself."""
        self._end_reading(broken=False)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._end_reading(broken=True)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._writable.set()

    async def _write(self, chunk: memoryview, patience: float | None) -> None:
        if not self._is_broken and self._transport is not None:
            self._transport.write(chunk)
            if not self._writable.is_set():
                async with asyncio.timeout(patience):
                    await self._writable.wait()
        if self._is_broken:
            raise PeerUnreachable(f"The connection to peer {self.remote} broke while sending.")

    async def _fill(self, target: memoryview, filled: int, patience: float | None) -> None:
        """Wait until all of `target` has come; its first `filled` bytes are there."""
        self._target, self._filled = target, filled
        try:
            self._take_ahead()
            if self._filled < len(target):
                await self._wait(patience)
        finally:
            self._target, self._filled = _NOTHING, 0

    def _take(self, count: int) -> bytearray:
        """So many of the bytes that were read ahead."""
        data = self._ahead[self._start : self._start + count]
        self._start += count
        if self._start == self._end:
            self._start = self._end = 0
        return data

    def _take_ahead(self) -> None:
        count = min(len(self._target) - self._filled, self._end - self._start)
        self._target[self._filled : self._filled + count] = self._ahead[self._start : self._start + count]
        self._filled += count
        self._start += count
        if self._start == self._end:
            self._start = self._end = 0

    async def _wait(self, patience: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._last_arrival = loop.time()
        while self._filled < len(self._target):
            if self._is_over:
                raise PeerUnreachable(f"The connection to peer {self.remote} was closed by the other end.")
            self._waiter = loop.create_future()
            if self._is_paused:
                self._go_on_reading()
            try:
                async with asyncio.timeout_at(None if patience is None else self._last_arrival + patience):
                    await self._waiter
            except TimeoutError as error:
                if patience is not None and loop.time() >= self._last_arrival + patience:
                    raise PeerUnreachable(f"Peer {self.remote} was silent for {patience:g} s.") from error

    def _go_on_reading(self) -> None:
        if self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def _end_reading(self, broken: bool) -> None:
        self._is_over = True
        self._is_broken = self._is_broken or broken
        if broken:
            self._writable.set()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _enlarged(data: bytearray, size: int) -> bytearray:
    larger = bytearray(size)
    larger[: len(data)] = data
    return larger


def _joined(buffers: Sequence[Buffer]) -> Sequence[Any]:
    """Small buffers as one: every write is a system call, a record to encrypt or a wake-up of p2pd."""
    if len(buffers) > 1 and sum([memoryview(buffer).nbytes for buffer in buffers]) <= _SMALL:
        return (b"".join(buffers),)
    return buffers
