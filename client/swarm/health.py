"""What a client learned of peers by using them: who failed and is kept away from, how far and how fast they are."""

import time
from collections import defaultdict
from dataclasses import dataclass, field

from client.swarm.routes import Hop
from protocol.records import PeerRecord

_FIRST_BAN, _LONGEST_BAN = 2.0, 300.0
"""Seconds."""
_UNMEASURED_RTT = 0.02
"""Seconds that the way to a peer and back is taken for until it has been measured."""
_SWITCH = 0.0005
"""Seconds that a hop costs beside its round trip: prefer few."""
_REMEMBER = 60.0
"""Seconds after which a peer that was slow, and was therefore not used, gets another chance."""


@dataclass
class _Ban:
    begun: float
    until: float
    length: float


@dataclass
class _Pace:
    """Seconds per block and token, as of late."""

    seconds: float
    since: float


class Asking:
    """A request that a peer is answering, for as long as a `with` block runs."""

    def __init__(self, others: "set[Asking]"):
        self._others = others
        self.alone = not others
        """Whether no other request of ours overlapped it so far: only then does its time tell how fast the peer is."""
        for other in others:
            other.alone = False
        others.add(self)
        self._begin = self._seconds = 0.0

    def __enter__(self) -> "Asking":
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.perf_counter() - self._begin
        self._others.discard(self)

    def restart(self) -> None:
        """Time from now on: what was sent before is not what the peer is timed by."""
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float | None:
        """How long it took, once the block has ended; None when another request overlapped it."""
        return self._seconds if self.alone else None


@dataclass
class Health:
    """What this client learned of peers by using them."""

    round_trips: dict[str, float] = field(default_factory=dict)
    """Seconds of the way to a peer and back, by peer ID, where it was measured."""
    _bans: dict[str, _Ban] = field(default_factory=dict)
    _apart: dict[tuple[str, str], float] = field(default_factory=dict)
    """Peers of which the first could not reach the second, and when that was."""
    _paces: dict[tuple[str, bool], _Pace] = field(default_factory=dict)
    """Of peers in use, by ID and whether of decode steps."""
    _asked: defaultdict[str, set[Asking]] = field(default_factory=lambda: defaultdict(set))

    def ban(self, peer_id: str, at_least: float = 0.0) -> None:
        """Keep away from a peer for a while, twice as long each time it fails again (exponential back-off)."""
        last = self._bans.get(peer_id)
        length = min(last.length * 2, _LONGEST_BAN) if last else _FIRST_BAN
        now = time.monotonic()
        self._bans[peer_id] = _Ban(now, now + max(length, at_least), length)

    def pardon(self, lately: float) -> None:
        """Lift the bans of the last `lately` seconds: the failure was our own."""
        since = time.monotonic() - lately
        for peer_id in [peer_id for peer_id, ban in self._bans.items() if ban.begun > since]:
            del self._bans[peer_id]

    def succeed(self, peer_id: str) -> None:
        """A peer answered: forget its failures, but not a ban that holds, which the answer may be older than."""
        if peer_id in self._bans and not self.is_banned(peer_id):
            del self._bans[peer_id]

    def is_banned(self, peer_id: str) -> bool:
        """Whether to keep away from a peer now."""
        ban = self._bans.get(peer_id)
        return ban is not None and time.monotonic() < ban.until

    def measured(self, peer_id: str, round_trip: float) -> None:
        """Take in a measured round trip (seconds). The shortest of late is what the link takes."""
        known = self.round_trips.get(peer_id)
        self.round_trips[peer_id] = round_trip if known is None else min(round_trip, 0.8 * known + 0.2 * round_trip)

    def could_not_reach(self, peer_id: str, other_id: str) -> None:
        """Take note that the first peer could not hand something over to the second."""
        self._apart[peer_id, other_id] = time.monotonic()

    def are_apart(self, peer_id: str, other_id: str) -> bool:
        """Whether the first peer could not reach the second of late."""
        return time.monotonic() - self._apart.get((peer_id, other_id), float("-inf")) < _LONGEST_BAN

    def asking(self, peer_id: str) -> Asking:
        """A peer is asked something for as long as the `with` block of this runs."""
        return Asking(self._asked[peer_id])

    def took(self, hop: Hop, tokens: int, seconds: float) -> None:
        """Take in how long a hop's answer for so many tokens (of all rows) took: peers may be slower than they say."""
        key = (hop.peer.peer_id, tokens == 1)
        pace = max(seconds - self._hop_cost(hop.peer), 0.0) / ((hop.end - hop.start) * tokens)
        known = self._recent(*key)
        self._paces[key] = _Pace(pace if known is None else 0.7 * known + 0.3 * pace, time.monotonic())

    def decode_cost(self, peer: PeerRecord, blocks: int) -> float:
        """Expected seconds of one decode step."""
        return self._hop_cost(peer) + blocks * max(1 / peer.speed.decode, self._recent(peer.peer_id, True) or 0.0)

    def forward_cost(self, peer: PeerRecord, blocks: int) -> float:
        """Expected seconds of a forward of 512 tokens."""
        pace = max(1 / peer.speed.forward, self._recent(peer.peer_id, False) or 0.0)
        return self._hop_cost(peer) + 512 * blocks * pace

    def _recent(self, peer_id: str, decode: bool) -> float | None:
        pace = self._paces.get((peer_id, decode))
        return pace.seconds if pace and time.monotonic() - pace.since < _REMEMBER else None

    def _hop_cost(self, peer: PeerRecord) -> float:
        return self.round_trips.get(peer.peer_id, _UNMEASURED_RTT) + _SWITCH
