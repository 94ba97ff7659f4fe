"""Which work runs next on the device: one compute thread, its time shared fairly between clients.

Start-time fair queuing (Goyal et al. 1996) over measured seconds: the client that has had the least goes first. One
that comes back from a pause starts level with the others: it has saved up nothing.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_HEAD_START = 0.1
"""Seconds of computing by which a step of a generation may run ahead of its client's share."""


class Priority(IntEnum):
    """Lower runs first among one client's work; between clients it is worth a head start."""

    STEP = 0
    """A step of a generation: somebody waits for every single one."""
    CALL = 1
    """A forward or a backward of training, or an adapter being put."""


class _Work(NamedTuple):
    priority: Priority
    number: int
    function: Callable[[], Any]
    future: asyncio.Future[Any]


@dataclass
class _Queue:
    """One client's work, and the seconds of computing that it is taken to have had."""

    used: float
    work: list[_Work] = field(default_factory=list)

    @property
    def turn(self) -> tuple[float, int]:
        """The least goes first."""
        first = self.work[0]
        return self.used - (_HEAD_START if first.priority is Priority.STEP else 0.0), first.number


class Scheduler:
    """Runs submitted functions one by one on a thread of its own, and hands results to the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Queue] = {}
        self._level = 0.0
        """The turn of the work begun last: where newcomers start."""
        self._numbers = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, priority: Priority, function: Callable[[], T], client: str = "") -> "asyncio.Future[T]":
        """Queue `function` for a client; the future belongs to the running loop. Cancelled work is not begun."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._ready:
            queue = self._waiting.setdefault(client, _Queue(self._level))
            if not queue.work:
                queue.used = max(queue.used, self._level)
            heapq.heappush(queue.work, _Work(priority, next(self._numbers), function, future))
            self._ready.notify()
        return future

    def close(self) -> None:
        """Begin no more work. What is running runs on."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def _work(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._closed or self._has_work())
                if self._closed:
                    return
                queue = min((queue for queue in self._waiting.values() if queue.work), key=lambda queue: queue.turn)
                self._level = max(self._level, queue.turn[0])
                work = heapq.heappop(queue.work)
            if not work.future.cancelled():
                begin = time.perf_counter()
                self._run(work)
                queue.used += time.perf_counter() - begin

    def _has_work(self) -> bool:
        """Also forgets clients that have no work and no debt."""
        for client in [c for c, queue in self._waiting.items() if not queue.work and queue.used <= self._level]:
            del self._waiting[client]
        return any(queue.work for queue in self._waiting.values())

    @staticmethod
    def _run(work: _Work) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = work.function()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop has closed: nobody waits
            work.future.get_loop().call_soon_threadsafe(_settle, work.future, result, failure)


def _settle(future: "asyncio.Future[Any]", result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
