"""Signals that end a process, made to end it in order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def like_interrupt(*numbers: signal.Signals) -> Iterator[None]:
    """Within the block these signals do what Ctrl-C does. Those that are ignored, as SIGHUP under nohup, stay so."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        on_interrupt = signal.getsignal(signal.SIGINT)
        if not callable(on_interrupt):  # a shell that starts a command in the background has it ignore Ctrl-C
            raise KeyboardInterrupt
        on_interrupt(number, frame)

    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
