"""Which work runs next on the device: one compute thread, decode before training."""

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Any, TypeVar

T = TypeVar("T")


class Priority(IntEnum):
    """Lower runs first."""

    STEP = 0
    """A step of a generation: somebody waits for every single one."""
    CALL = 1
    """A forward or a backward of training, or an adapter being put."""


class Scheduler:
    """Runs submitted functions one by one on a thread of its own, and hands results to the event loop."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Callable[[], Any], asyncio.Future[Any]]] = []
        self._numbers = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, priority: Priority, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Queue `function`; the future belongs to the running loop. A cancelled future's work is not begun."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._ready:
            heapq.heappush(self._heap, (priority, next(self._numbers), function, future))
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
                self._ready.wait_for(lambda: self._heap or self._closed)
                if self._closed:
                    return
                _, _, function, future = heapq.heappop(self._heap)
            if not future.cancelled():
                self._run(function, future)

    @staticmethod
    def _run(function: Callable[[], Any], future: "asyncio.Future[Any]") -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop has closed: nobody waits
            future.get_loop().call_soon_threadsafe(_settle, future, result, failure)


def _settle(future: "asyncio.Future[Any]", result: Any, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)
