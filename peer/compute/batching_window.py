"""Whether work is worth waiting for that comes a moment after other work, with which it could have been done in one go.

Clients whose steps went through one call send their next ones at about the same time. If the first of these were run at
once, the others would find the device busy, and each round would take two calls. So it is noted how much work came just
too late for a call; while that is a good part of what was in it, the next call waits that long (in the spirit of
anticipatory scheduling, Iyer and Druschel 2001). A single stream never waits: nothing comes while it is answered.

Where work has queued behind a call, more calls go round between the peers of a swarm than there are peers to run them.
There the next is worth waiting for even if it takes most of a call: the two are one from then on, round after round.
"""

from dataclasses import dataclass

_MEMORY = 0.7
"""How much of what was learnt is kept from call to call."""
_WORTH_IT = 0.3
"""Late work per work in time for which waiting pays."""


@dataclass
class Gathering:
    """What has been learnt from the calls so far. Times are `time.monotonic`, in seconds."""

    share: float
    """How long a moment is: this share of a call's time,"""
    most: float
    """and at most so many seconds."""
    moment: float = 0.0
    """So long a call may wait."""
    expected: int = 0
    """Pieces of work that the last call had, and that came a moment too late for it."""
    _late: int = 0
    """Pieces of work that came within a moment of when the last call could have begun."""
    _in_time: int = 0
    _ready: float = -1.0
    _began: float = -1.0
    _worth: float = 0.0

    @property
    def pays(self) -> bool:
        """Whether the next call had better wait a moment."""
        return self._worth > _WORTH_IT

    def arrived(self, now: float) -> None:
        """A piece of work has come."""
        if now - self._ready <= self.moment:
            self._late += 1
            self.expected += 1

    def begins(self, ready: float, now: float, count: int, waited_for: int) -> None:
        """A call begins that could have begun at `ready`, with `count` pieces of work, `waited_for` of which came
        since."""
        if self._in_time:
            found = min(1.0, self._late / self._in_time)
            self._worth = _MEMORY * self._worth + (1 - _MEMORY) * found
        self._ready, self._began, self._in_time, self.expected = ready, now, count - waited_for, count
        self._late = waited_for

    def ended(self, now: float) -> None:
        """The call has ended."""
        self.moment = min(self.most, self.share * (now - self._began))
