"""How far a fetch is, for people: a bar on a terminal, else a line now and then; and its rate, for the directory."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_PERIOD = 10.0
"""Seconds between two lines where there is no terminal."""
_WINDOW = 5.0
"""Seconds over which the rate is taken."""


class Progress:
    """One fetch of `total` bytes of the model `name`."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done, self.sources = name, total, 0, 0
        self._arrivals = deque([(time.monotonic(), 0)])
        self._said = time.monotonic()
        self._bar = _new_bar(name, total) if sys.stderr.isatty() else None

    @property
    def rate(self) -> float:
        """Bytes per second that came of late."""
        (since, before), (until, now) = self._arrivals[0], (time.monotonic(), self.done)
        return (now - before) / max(until - since, 1e-3)

    def add(self, size: int, sources: int) -> None:
        """`size` more bytes are here, and so many members gave some of late."""
        self.done, self.sources = self.done + size, sources
        now = time.monotonic()
        self._arrivals.append((now, self.done))
        while len(self._arrivals) > 2 and self._arrivals[0][0] < now - _WINDOW:
            self._arrivals.popleft()
        if self._bar is not None:
            self._bar.set_postfix_str(f"from {sources}", refresh=False)
            self._bar.update(size)
        elif now > self._said + _PERIOD:
            self._said = now
            logger.info("%s", self.describe())

    def describe(self) -> str:
        """A line."""
        left = (self.total - self.done) / max(self.rate, 1.0)
        return (
            f"fetching {self.name}: {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB from {self.sources} members "
            f"at {self.rate / 1e6:,.1f} MB/s, {left:,.0f} s left"
        )

    def close(self) -> None:
        """It is over."""
        if self._bar is not None:
            self._bar.close()


Start = Callable[[str, int], Progress]


def _new_bar(name: str, total: int) -> Any:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, desc=f"fetching {name}", unit="B", unit_scale=True, dynamic_ncols=True)
