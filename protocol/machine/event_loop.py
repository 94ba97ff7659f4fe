"""The event loop that all of this runs on: uvloop's, where there is one."""

import asyncio
import logging
from typing import Any

try:
    from uvloop import new_event_loop as _new_event_loop
except ImportError:  # Windows
    from asyncio import new_event_loop as _new_event_loop

_log = logging.getLogger(__name__)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop that says nothing of connections that were closed while they were in use: who uses them learns of it."""
    loop: asyncio.AbstractEventLoop = _new_event_loop()
    loop.set_exception_handler(_handle)
    return loop


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
        # uvloop's TLS answers what was still to be read, and prints a traceback when it cannot; asyncio's does not.
        _log.debug("%s: %s", context.get("message"), error)
    else:
        loop.default_exception_handler(context)
