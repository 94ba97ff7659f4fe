"""Several ways to one connection are tried, and the first that succeeds is taken ("happy eyeballs", RFC 8305)."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar


class _Closable(Protocol):
    def close(self) -> None: ...


R = TypeVar("R", bound=_Closable)


async def first(ways: Iterable[Callable[[], Coroutine[Any, Any, R]]], head_start: float) -> R:
    """The result of the first of `ways` that succeeds; the others are cancelled, and their connections closed.

    A way is begun when one before it has failed, or when those before it have taken `head_start` seconds. Raises the
    last error when all have failed.
    """
    waiting = list(ways)
    running = set[asyncio.Task[R]]()
    try:
        while True:
            if waiting:
                running.add(asyncio.create_task(waiting.pop(0)()))
            timeout = head_start if waiting else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                running.discard(task)
                if task.exception() is None or not (waiting or running):
                    return task.result()
    finally:
        for task in running:
            task.add_done_callback(close_result)
            task.cancel()


def close_result(task: asyncio.Task[R]) -> None:
    """Close the result of a task that nobody waits for any more."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()
