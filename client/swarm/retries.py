"""What to do when a peer fails: go round it, wait when there is nobody left to ask, give up in the end."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from client.swarm.routes import Hop, describe_holes
from client.swarm.swarm import Purpose, Swarm
from protocol.errors import (
    BadAdapter,
    BadRequest,
    NoConnection,
    NoRoute,
    NotAllowed,
    NotAMember,
    NotPushed,
    PeerUnreachable,
    SessionLost,
    SwarmError,
    TooLong,
    WrongModel,
)
from protocol.records import PeerRecord

_NOT_THIS = (BadRequest, BadAdapter, TooLong, WrongModel, NotAMember, NotAllowed)
"""What a peer refuses will not get better by waiting; another peer may still take it."""
_WELL = (SessionLost, NotPushed)
"""The peer is well, and may be asked to begin again."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


class Retries:
    """The attempts at one piece of work. `row`: tokens of its rows, where it is to be trained."""

    def __init__(self, swarm: Swarm, row: int = 0):
        self._swarm, self._row = swarm, row
        self._left = swarm.config.max_attempts
        self._pause = _FIRST_PAUSE
        self._refused = set[str]()
        self._unconnected = set[str]()
        """Peers that could not be connected to: each may have gone since the directory heard of it, once for free."""
        self._last: SwarmError | None = None

    def failed(self, peer: PeerRecord, error: SwarmError) -> None:
        """Take note that `peer` failed with `error`: the next route goes round it."""
        if isinstance(error, NoConnection) and peer.peer_id not in self._unconnected:
            self._unconnected.add(peer.peer_id)
        else:
            self._left -= 1
        if isinstance(error, _NOT_THIS):
            self._refused.add(peer.peer_id)
        elif not isinstance(error, _WELL):
            self._swarm.blame(peer, error)
        self._last = error

    async def find_route(self, start: int, end: int, purpose: Purpose) -> list[Hop]:
        """A route round the peers that failed; waits for one to come back or to turn up.

        Raises `NoRoute` when nobody serves the blocks, and after too many attempts that, or a peer's last refusal;
        `TooLong` when nobody can train such a row.
        """
        missing: NoRoute | None = None
        while self._left > 0:
            try:
                return await self._swarm.find_route(start, end, purpose, self._refused, self._row)
            except NoRoute as error:
                missing = error
                self._left -= 1
                if self._last is None and not self._swarm.may_recover(start, end):
                    raise
                if isinstance(self._last, _NOT_THIS):
                    raise self._last from None
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if self._last is not None and not isinstance(self._last, PeerUnreachable):
            raise self._last
        raise (missing or NoRoute(describe_holes([], start, end))) from self._last

    async def hop_by_hop(self, route: Sequence[Hop], purpose: Purpose, do: Callable[[Hop], Awaitable[None]]) -> None:
        """Do something on one hop of a route after the other; elsewhere where a peer fails. Raises as `find_route`."""
        left = list(route)
        while left:
            hop = left.pop(0)
            try:
                await do(hop)
            except SwarmError as error:
                self.failed(hop.peer, error)
                left = [*await self.find_route(hop.start, hop.end, purpose), *left]
