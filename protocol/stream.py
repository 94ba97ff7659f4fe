"""What a carrier gives: ordered duplex byte streams between two authenticated ends. See `protocol.transport`."""

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

Buffer = bytes | bytearray | memoryview

Carrier = Literal["auto", "direct", "libp2p"]
"""How to connect; auto: directly if that works, else by libp2p."""

CHUNK = 2**20
"""Bytes of one write at most: a carrier refuses or stalls on larger messages (p2pd: 4 MiB)."""


class Stream(Protocol):
    """An ordered duplex byte stream to one remote. All methods raise `PeerUnreachable` when it is broken."""

    remote: str
    """The remote's peer ID, as the carrier authenticated it."""

    @property
    def available(self) -> int:
        """Bytes that have come already, so that a `receive` of so many does not wait."""

    async def send(self, *buffers: Buffer, patience: float | None) -> None:
        """Write `buffers` in order. It is broken when a chunk takes over `patience` seconds (None: no limit)."""

    async def receive(self, count: int, patience: float | None) -> bytearray:
        """Exactly `count` bytes. It is broken when nothing arrives for `patience` seconds (None: no limit)."""

    def close(self) -> None:
        """Close both directions; a pending `receive` of either end fails."""


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """A carrier."""

    async def connect(self, peer_id: str) -> Stream:
        """A new stream to `peer_id`. Raises `PeerUnreachable`."""

    async def serve(self, handler: Handler) -> None:
        """From now on run `handler` for every stream that others open; the stream is closed when it returns."""

    async def stop_serving(self) -> None:
        """Accept no further streams."""
