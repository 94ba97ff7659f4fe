"""Ctrl-C that stops at once where that is safe, and a moment later where it is not."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class InterruptGuard:
    """While entered, Ctrl-C (SIGINT) raises KeyboardInterrupt at once, except between `hold` and `release`: then at
    `release`. What stands between them is never torn apart: an optimizer step and the count of it, a checkpoint.

    Signals belong to the main thread; entered in another one it only keeps the count of holds.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending = False
        self._before: Any = None

    @property
    def held(self) -> bool:
        """Whether something is going on that may not be torn apart."""
        return self._depth > 0

    def hold(self) -> None:
        """From here on an interrupt waits."""
        self._depth += 1

    def release(self) -> None:
        """Ends one `hold`.

        Raises:
            KeyboardInterrupt: it was the last and an interrupt waited.
        """
        self._depth -= 1
        if self._depth == 0 and self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def __enter__(self) -> "InterruptGuard":
        self._depth, self._pending = 0, False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.held:
            raise KeyboardInterrupt
        self._pending = True
