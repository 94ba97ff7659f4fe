"""The life of a command that runs until it is told to stop."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

from protocol.machine.event_loop import new_event_loop


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a command to its end."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(coroutine)


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and Ctrl-C set; a second one of them ends the process at once."""
    stop = asyncio.Event()

    def react() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, react)
    return stop


async def unless_stopped(starting: Coroutine[Any, Any, Any], stop: asyncio.Event) -> Any:
    """The result of `starting`, or `None` when the user wants to stop before it is there."""
    task, stopped = asyncio.create_task(starting), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    return task.result()


def leave_at_once() -> NoReturn:
    """Everything is closed; the interpreter's own end takes a second, and waits for a thread that loads or computes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def say_ready(addresses: list[str], details: str = "") -> None:
    """Print the line that says where others join."""
    print(f"ready address={addresses[0]} {details}".rstrip(), flush=True)
    for other in addresses[1:]:
        logging.getLogger("peer").info("also at %s", other)
