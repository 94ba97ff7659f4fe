"""Whether work is worth waiting for that comes a moment after other work, with which it could have been done in one go.

Clients whose steps went through one call send their next ones at about the same time. If the first of these were run at
once, the others would find the device busy, and each round would take two calls. So it is noted how much work came just
too late for a call; while that is a good part of what was in it, the next call waits that long (in the spirit of
anticipatory scheduling, Iyer and Druschel 2001). A single stream never waits: nothing comes while it is answered.
"""

from dataclasses import dataclass

_SHARE, _MOST = 0.15, 0.02
"""How long a moment is: this share of a call's time, and at most so many seconds."""
_MEMORY = 0.7
"""How much of what was learnt is kept from call to call."""
_WORTH_IT = 0.3
"""Late work per work in time for which waiting pays."""


@dataclass
class Gathering:
    """What has been learnt from the calls so far. Times are `time.monotonic`, in seconds."""

    moment: float = 0.0
    """So long a call may wait."""
    expected: int = 0
    """Pieces of work that the last call had, and that came a moment too late for it."""
    _late: int = 0
    """Pieces of work that came a moment after the last call began, or for which it waited."""
    _in_time: int = 0
    _began: float = -1.0
    _worth: float = 0.0

    @property
    def pays(self) -> bool:
        """Whether the next call had better wait a moment."""
        return self._worth > _WORTH_IT

    def arrived(self, now: float) -> None:
        """A piece of work has come."""
        if now - self._began <= self.moment:
            self._late += 1
            self.expected += 1

    def begins(self, now: float, count: int, waited_for: int) -> None:
        """A call with `count` pieces of work begins, `waited_for` of which came while it waited."""
        if self._in_time:
            found = min(1.0, self._late / self._in_time)
            self._worth = _MEMORY * self._worth + (1 - _MEMORY) * found
        self._began, self._in_time, self.expected = now, count - waited_for, count
        self._late = waited_for

    def ended(self, now: float) -> None:
        """The call has ended."""
        self.moment = min(_MOST, _SHARE * (now - self._began))
