"""The sessions that one client has open on peers: those that lie idle give way before a peer has to refuse another.

Users keep outputs, and each has a cache. What is closed here is not lost: its owner holds what it takes to make the
session again.
"""

from collections import defaultdict
from typing import Protocol

_MOST = 96
"""Sessions on one peer. Peers allow 128 by default, and notice a moment late that one has ended."""


class Session(Protocol):
    """A session on a peer."""

    is_idle: bool
    """Whether it may be closed now: nothing is being done with it."""

    def close(self) -> None:
        """End it; calls `OpenSessions.remove`."""


class OpenSessions:
    """A client's sessions, by peer. Used on the loop only."""

    def __init__(self) -> None:
        self._open = defaultdict[str, dict[Session, None]](dict)
        """Peer -> its sessions, those that were used least lately first."""

    def add(self, peer_id: str, session: Session) -> None:
        """A session is open, or was used again."""
        self.remove(peer_id, session)
        self._open[peer_id][session] = None

    def remove(self, peer_id: str, session: Session) -> None:
        """A session has ended."""
        self._open[peer_id].pop(session, None)

    def make_room(self, peer_id: str) -> None:
        """Have idle sessions give way where one more would be too many."""
        while len(self._open[peer_id]) >= _MOST and self.give_way(peer_id):
            pass

    def give_way(self, peer_id: str) -> bool:
        """Close the session on a peer that has lain idle the longest; returns whether there was one."""
        idle = next((session for session in self._open[peer_id] if session.is_idle), None)
        if idle is None:
            return False
        idle.close()
        return True
