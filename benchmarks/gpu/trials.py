"""How the trials of a span came out, and why: the arena, joined steps, compiled steps."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from benchmarks.gpu.report import Figures
from peer.generation.joined.batched_pass import Joiner
from peer.generation.joined.packing import Packer
from peer.kv_cache.arena import Arena
from peer.span.span import Span
from peer.start.arena_trial import arena_for
from peer.start.compile_trial import compile_steps
from peer.start.joining_trial import find_joiner

T = TypeVar("T")


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What trials log: that something was left off, and why."""
    logger, said = logging.getLogger("peer.start"), _Said()
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    try:
        yield said.lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(said)


def _tried(trial: Callable[[], T]) -> tuple[T, str]:
    with _listening() as said:
        return trial(), ", ".join(said)


def try_arena_and_joining(span: Span, slots: int) -> tuple[Arena, Joiner | None, Figures]:
    """An arena of so many slots and how sessions are joined, as a peer finds them, and what is said about it."""
    arena, kept_out = _tried(lambda: arena_for(span, slots))
    joiner, unjoined = _tried(lambda: find_joiner(span))
    way = type(joiner).__name__ if joiner else "no way"
    return arena, joiner, {"arena:": kept_out or "yes", "joined by": f"{way} ({unjoined})" if unjoined else way}


def try_compiling(span: Span, joiner: Joiner | None, compiler: str) -> Figures:
    """As with `peer serve --compile`; `compiler` is torch.compile's backend."""
    if not isinstance(joiner, Packer):
        return {"compiled:": "not tried, as steps are not packed"}
    return {"compiled:": _tried(lambda: compile_steps(span, compiler))[1]}
