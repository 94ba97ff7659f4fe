"""A carrier in memory: what one end sends, the other receives."""

import asyncio

from protocol.errors import PeerUnreachable
from protocol.stream import Buffer


class MemoryStream:
    """One end of a `protocol.stream.Stream`."""

    def __init__(self, remote: str):
        self.remote = remote
        self.other: MemoryStream = self
        self.pending = bytearray()
        """What has come and was not received yet."""
        self.is_closed = False
        self.starved = asyncio.Event()
        """Set while a `receive` waits for more than there is."""
        self._arrived = asyncio.Event()

    @property
    def available(self) -> int:
        """See `Stream.available`."""
        return len(self.pending)

    async def send(self, *buffers: Buffer, patience: float | None) -> None:
        """See `Stream.send`."""
        if self.is_closed:
            raise PeerUnreachable(f"The connection to peer {self.remote} broke while sending.")
        for buffer in buffers:
            self.other.pending += buffer
        self.other._wake()

    async def receive(self, count: int, patience: float | None) -> bytearray:
        """See `Stream.receive`."""
        try:
            async with asyncio.timeout(patience):
                while len(self.pending) < count:
                    await self._wait()
        except TimeoutError as error:
            raise PeerUnreachable(f"Peer {self.remote} was silent for {patience} s.") from error
        data, self.pending = self.pending[:count], self.pending[count:]
        return data

    async def _wait(self) -> None:
        if self.is_closed:
            raise PeerUnreachable(f"The connection to peer {self.remote} was closed by the other end.")
        self._arrived.clear()
        self.starved.set()
        await self._arrived.wait()

    def close(self) -> None:
        """See `Stream.close`."""
        for end in (self, self.other):
            end.is_closed = True
            end._wake()

    def _wake(self) -> None:
        self.starved.clear()
        self._arrived.set()


def connect(caller: str, peer: str) -> tuple[MemoryStream, MemoryStream]:
    """A stream from `caller` to `peer`: the caller's end, and the peer's."""
    near, far = MemoryStream(peer), MemoryStream(caller)
    near.other, far.other = far, near
    return near, far
