"""The client's event loop: one background thread of the user's process, shared by all models in it."""

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from protocol.errors import BadUsage
from protocol.machine.event_loop import new_event_loop

T = TypeVar("T")


class BackgroundLoop:
    """An event loop in a daemon thread, started at first use and stopped at exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inherited: asyncio.AbstractEventLoop | None = None
        """The parent's, in a fork. Kept: its end would close what the parent uses."""
        self._closers: list[Any] = []
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """A fork inherits the loop, and not the thread that runs it."""
        self._lock, self._loop, self._inherited = threading.Lock(), None, self._loop or self._inherited

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and wait for it. Ctrl-C cancels it."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def call(self, function: Any, *arguments: Any) -> None:
        """Have the loop call `function`; does nothing when it has stopped. May be called from a finalizer."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *arguments)

    def at_exit(self, close: Any) -> None:
        """Await `close()` on the loop before the process ends."""
        self._closers.append(close)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="swarm", daemon=True).start()
                atexit.register(self._stop)
            return self._loop

    def _stop(self) -> None:
        async def close_all() -> None:
            await asyncio.wait_for(asyncio.gather(*(close() for close in self._closers), return_exceptions=True), 3)

        loop = self._loop
        if loop is None:  # a fork that has none, or has stopped it: it inherited this call, and registered its own
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(close_all(), loop).result(4)
        loop.call_soon_threadsafe(loop.stop)
        self._loop = None


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


class ProcessLoop:
    """The loop, for what was made on it in this process: a fork inherits that, and cannot use it."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """As `BackgroundLoop.run`. Raises `BadUsage` in a fork."""
        self._check(coroutine)
        return LOOP.run(coroutine)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """As `BackgroundLoop.start`. Raises `BadUsage` in a fork."""
        self._check(coroutine)
        return LOOP.start(coroutine)

    def call(self, function: Any, *arguments: Any) -> None:
        """As `BackgroundLoop.call`; does nothing in a fork."""
        if self._process == os.getpid():
            LOOP.call(function, *arguments)

    def _check(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        if self._process != os.getpid():
            coroutine.close()  # nobody will await it, and Python would say so
            raise BadUsage("This process was forked from the one that loaded the model; load the model after the fork.")
