"""How fast weights are given away, and to whom which piece was given."""

import asyncio
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from protocol.errors import OverQuota
from protocol.weights.parts import Held

T = TypeVar("T")

ROOM = 16
"""Pieces in memory at a time, for all askers."""
_STREAMS = 8
"""Of one asker."""
_REMEMBERED = 600.0
"""Seconds for which it is known who was given a piece."""
_ON_ITS_WAY, _MOMENT = 30.0, 2.0
"""Seconds that a piece may take to a member, and in which that member then checks it and writes it."""
_CROWD = 5.0
"""Seconds after its last question for which an asker counts as one of many."""
WHILE_COMPUTING = 32e6
"""Bytes per second at most while this peer computes for somebody: to read, hash and encrypt them takes 6 % of a core
(1.9 s for each gigabyte)."""
_NICE = 10
"""How much less than others the thread that reads and hashes asks of the processors."""
_MAX_REMEMBERED = 2**20


class Uploads:
    """The giving of pieces, at `rate` bytes per second at most."""

    def __init__(self, rate: float):
        self._rate = rate
        self.computes: Callable[[], bool] = lambda: False
        """Whether this peer computes for somebody, behind whom it steps back then."""
        self.pieces = self.bytes = 0
        """Given since the start."""
        self._turn, self._free_at = asyncio.Lock(), 0.0
        """Held by the piece that goes next, and when it may, by the clock of the loop."""
        self.room = asyncio.Semaphore(ROOM)
        """Held for each piece that is in memory."""
        self._streams = Counter[str]()
        self._asked: dict[str, float] = {}
        self._given: dict[tuple[str, int], tuple[str, float]] = {}
        """Manifest and piece -> the last member that gets it and gives it on, and until when also those are sent there
        who have asked there in vain."""
        self._reader = ThreadPoolExecutor(1, "weights", initializer=_be_nice)

    @contextmanager
    def stream(self, asker: str) -> Iterator[None]:
        """An asker's stream. Raises `OverQuota`."""
        if self._streams[asker] >= _STREAMS:
            raise OverQuota(f"One member may fetch weights over {_STREAMS} streams from this one at a time.")
        self._streams[asker] += 1
        try:
            yield
        finally:
            self._streams[asker] -= 1
            if not self._streams[asker]:
                del self._streams[asker]
                self._asked.pop(asker, None)

    def holder(self, held: Held, number: int, asker: str, insists: bool) -> str | None:
        """Another member that gets the piece from here, and is to give it in this one's place; where many ask only.

        Who `insists` has asked there: it is sent there again only while the other may not have got it yet.
        """
        now = time.monotonic()
        self._asked[asker] = now
        member, firm = self._given.get((held.manifest.hash, number), ("", -math.inf))
        is_crowded = sum(then > now - _CROWD for then in self._asked.values()) > 1
        is_there = now < (firm if insists else firm + _REMEMBERED) and member in self._streams
        return member if is_crowded and is_there and member != asker else None

    @contextmanager
    def giving(self, held: Held, number: int, asker: str) -> Iterator[None]:
        """In the block a piece goes to an asker that gives on what it gets: others are sent there from now on."""
        key = held.manifest.hash, number
        if len(self._given) >= _MAX_REMEMBERED:
            del self._given[next(iter(self._given))]
        self._given[key] = asker, time.monotonic() + _ON_ITS_WAY
        try:
            yield
        except BaseException:
            self._given.pop(key, None)
            raise
        self._given[key] = asker, time.monotonic() + _MOMENT

    async def read(self, held: Held, number: int) -> bytes:
        """A piece, when its turn has come. Raises as `Held.read`."""
        size = held.manifest.pieces[number].size if held.has(number) else 0
        loop = asyncio.get_running_loop()
        async with self._turn:
            await asyncio.sleep(self._free_at - loop.time())
            rate = min(self._rate, WHILE_COMPUTING) if self.computes() else self._rate
            self._free_at = max(self._free_at, loop.time()) + size / rate
        data = await loop.run_in_executor(self._reader, held.read, number)
        self.pieces, self.bytes = self.pieces + 1, self.bytes + size
        return data

    async def aside(self, work: Callable[[], T]) -> T:
        """What `work` returns, done behind all else."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)


def _be_nice() -> None:
    with suppress(OSError, AttributeError):  # another system than Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
