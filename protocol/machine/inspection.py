"""What a running process does, told on a signal: `kill -USR1 PID` has it written to the process's stderr.

First come the stacks of all threads, at once, also where the event loop hangs or a thread never returns to Python: the
signal handler itself writes them (`faulthandler`). Then, when the event loop gets to it, the names of the threads, what
each task of the loop waits for, and what the process says of itself.
"""

import asyncio
import faulthandler
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

_STDERR = 2
"""The file descriptor: `sys.stderr` may be replaced by what is none."""


def show_stacks_on_signal() -> None:
    """From now on SIGUSR1 shows the stacks of all threads, where it would end the process. In the main thread only."""
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True)


def describe_on_signal(describe: Callable[[], Iterable[str]]) -> None:
    """From now on SIGUSR1 shows the running event loop's tasks, and the lines of `describe`, after the stacks.

    To be called in the main thread, in a coroutine; called again, it puts another `describe` in the place of the first.
    """
    faulthandler.unregister(signal.SIGUSR1)  # the loop's own handler would take its place
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _show, describe)
    faulthandler.register(signal.SIGUSR1, _STDERR, all_threads=True, chain=True)


def _show(describe: Callable[[], Iterable[str]]) -> None:
    tasks = sorted(asyncio.all_tasks(), key=lambda task: (len(task.get_name()), task.get_name()))  # Task-9, Task-10
    sections = {
        "threads": (f"0x{thread.ident or 0:016x} {thread.name}" for thread in threading.enumerate()),
        "tasks": (line for task in tasks for line in _describe_task(task)),
        "state": describe(),
    }
    print(
        *(f"--- {name}\n" + "\n".join(lines) for name, lines in sections.items()), sep="\n", file=sys.stderr, flush=True
    )


def _describe_task(task: asyncio.Task[object]) -> Iterator[str]:
    """The task, and where it waits: outermost call first, as in a traceback."""
    yield f"{task.get_name()}:"
    frames = ((frame, frame.f_lineno) for frame in _frames(task.get_coro()))
    yield from "".join(traceback.StackSummary.extract(frames).format()).splitlines()


def _frames(awaited: object) -> Iterator[FrameType]:
    """Of a coroutine or a generator and of what it awaits in turn. (`Task.get_stack` knows the first only.)"""
    while awaited is not None:
        frame = _first(awaited, "cr_frame", "gi_frame", "ag_frame")
        if isinstance(frame, FrameType):
            yield frame
        awaited = _first(awaited, "cr_await", "gi_yieldfrom", "ag_await")


def _first(thing: object, *attributes: str) -> object:
    return next((value for name in attributes if (value := getattr(thing, name, None)) is not None), None)
