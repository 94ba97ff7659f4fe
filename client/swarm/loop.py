"""The client's event loop: one background thread of the user's process, shared by all models in it."""

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

try:
    from uvloop import new_event_loop
except ImportError:  # Windows
    from asyncio import new_event_loop

from protocol.errors import BadUsage

T = TypeVar("T")


class BackgroundLoop:
    """An event loop in a daemon thread, started at first use and stopped at exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        """The one whose thread runs the loop: a fork inherits the loop and no thread."""
        self._closers: list[Any] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and wait for it. Ctrl-C cancels it. Raises `BadUsage` in a fork."""
        if self._is_forked:
            coroutine.close()  # nobody will await it, and Python would say so
            raise BadUsage(
                "This process was forked from one that is in a swarm already; load the model after the fork."
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Any, *arguments: Any) -> None:
        """Have the loop call `function`; does nothing when it has stopped. May be called from a finalizer."""
        loop = self._loop
        if loop is not None and not loop.is_closed() and not self._is_forked:
            loop.call_soon_threadsafe(function, *arguments)

    def at_exit(self, close: Any) -> None:
        """Await `close()` on the loop before the process ends."""
        self._closers.append(close)

    @property
    def _is_forked(self) -> bool:
        return self._loop is not None and self._process != os.getpid()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._process = os.getpid()
                self._loop = new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="swarm", daemon=True).start()
                atexit.register(self._stop)
            return self._loop

    def _stop(self) -> None:
        async def close_all() -> None:
            await asyncio.wait_for(asyncio.gather(*(close() for close in self._closers), return_exceptions=True), 3)

        if self._is_forked:
            return
        loop = self._running()
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(close_all(), loop).result(4)
        loop.call_soon_threadsafe(loop.stop)


async def settle(tasks: Sequence["asyncio.Task[T]"]) -> list[T]:
    """The results of all; when one fails or this is cancelled, the others are ended first."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


LOOP = BackgroundLoop()
