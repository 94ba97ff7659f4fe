"""Whether the next pass had better wait a moment for more work, so that both go through together.

Late is the work that comes within a moment of when a pass could have begun; in time is what was there by then. Passes
wait while

    late / in time, averaged over the passes so far  >  0.3

and a moment is a share of the last pass's time, at most so many seconds.

Why: clients whose steps went through together send their next ones at about the same time. If the first of these were
run at once, the others would find the device busy, and each round would take two passes (in the spirit of anticipatory
scheduling, Iyer and Druschel 2001). A single stream never waits: nothing comes while its step is being answered.
"""

from dataclasses import dataclass

_KEPT = 0.7
"""How much of the average stays from pass to pass."""
_WORTH_IT = 0.3


@dataclass
class BatchingWindow:
    """What has been learnt from the passes so far. Times are `time.monotonic`, in seconds."""

    share: float
    """How long a moment is: this share of the last pass's time,"""
    most: float
    """and at most so many seconds."""
    moment: float = 0.0
    """How long the next pass may wait."""
    expected: int = 0
    """Work that the last pass had, and that came a moment too late for it: when all is there, nobody need wait."""
    _late_share: float = 0.0
    """Late / in time, averaged."""
    _late: int = 0
    """Pieces of work that came late for the last pass."""
    _in_time: int = 0
    """Pieces of work that were there in time for the last pass."""
    _ready: float = -1.0
    """When the last pass could have begun."""
    _began: float = -1.0

    @property
    def pays(self) -> bool:
        """Whether the next pass had better wait a moment."""
        return self._late_share > _WORTH_IT

    def arrived(self, now: float) -> None:
        """A piece of work has come."""
        if now - self._ready <= self.moment:
            self._late += 1
            self.expected += 1

    def started(self, ready: float, now: float, count: int, waited_for: int) -> None:
        """A pass of `count` pieces of work begins.

        It could have begun at `ready`; `waited_for` of the pieces came since then, and so did not in time.
        """
        if self._in_time:
            found = min(1.0, self._late / self._in_time)
            self._late_share = _KEPT * self._late_share + (1 - _KEPT) * found
        self._ready, self._began = ready, now
        self._in_time, self._late, self.expected = count - waited_for, waited_for, count

    def ended(self, now: float) -> None:
        """The pass has ended."""
        self.moment = min(self.most, self.share * (now - self._began))
