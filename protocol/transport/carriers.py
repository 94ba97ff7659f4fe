"""The choice of a carrier for each stream: direct where that works, else libp2p."""

import asyncio
from dataclasses import dataclass
from functools import partial

from protocol.errors import PeerUnreachable
from protocol.records import Door, PeerRecord, WeightsRecord
from protocol.stream import Carrier, Handler, Stream, Transport
from protocol.transport.direct import DirectCaller, DirectListener
from protocol.transport.race import first

HEAD_START = 0.3
"""Seconds that a direct connection gets before libp2p is tried too."""
_FIRST_REST, _LONGEST_REST = 5.0, 300.0
"""Seconds for which a door that failed is not tried; the time doubles each time the door fails again."""
_MAX_DOORS = 4096


@dataclass
class _Known:
    """The door of one peer, and until when it is not tried."""

    door: Door
    rest: float = 0.0
    closed_until: float = 0.0

    def fail(self) -> None:
        """Do not try the door for a while."""
        self.rest = min(self.rest * 2, _LONGEST_REST) if self.rest else _FIRST_REST
        self.closed_until = asyncio.get_running_loop().time() + self.rest

    def succeed(self) -> None:
        """Forget how it failed."""
        self.rest = self.closed_until = 0.0


class Carriers:
    """A `Transport` over both carriers, which learns from records where other peers' doors are."""

    def __init__(self, libp2p: Transport, caller: DirectCaller, listener: DirectListener | None):
        self._libp2p, self._caller, self._listener = libp2p, caller, listener
        self._doors: dict[str, _Known] = {}

    def learn(self, record: PeerRecord | WeightsRecord) -> None:
        """Take note of a peer's door, or that it has none. The record's signature must have been checked.

        A door that failed and has not changed stays closed for a while.
        """
        known = self._doors.pop(record.peer_id, None)
        if record.direct is None:
            return
        if known is None or known.door != record.direct:
            known = _Known(record.direct)
        self._doors[record.peer_id] = known
        if len(self._doors) > _MAX_DOORS:
            del self._doors[next(iter(self._doors))]

    async def connect(self, peer_id: str, carrier: Carrier = "auto") -> Stream:
        """See `Transport.connect`."""
        known = self._doors.get(peer_id)
        if carrier == "direct":
            if known is None:
                raise PeerUnreachable(f"Peer {peer_id} cannot be reached directly: it has announced no address for it.")
            return await self._enter(peer_id, known)
        if carrier == "libp2p" or known is None or asyncio.get_running_loop().time() < known.closed_until:
            return await self._libp2p.connect(peer_id)
        ways = [partial(self._enter, peer_id, known), partial(self._libp2p.connect, peer_id)]
        return await first(ways, HEAD_START)

    async def serve(self, handler: Handler) -> None:
        """See `Transport.serve`."""
        if self._listener is not None:
            await self._listener.serve(handler)
        await self._libp2p.serve(handler)

    async def stop_serving(self) -> None:
        """See `Transport.stop_serving`."""
        if self._listener is not None:
            self._listener.close()
        await self._libp2p.stop_serving()

    def hang_up(self) -> None:
        """Close the direct streams to others."""
        self._caller.close()

    async def _enter(self, peer_id: str, known: _Known) -> Stream:
        try:
            stream = await self._caller.connect(peer_id, known.door)
        except BaseException:  # also cancelled: libp2p was faster
            known.fail()
            raise
        known.succeed()
        return stream
