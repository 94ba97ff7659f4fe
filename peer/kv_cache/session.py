"""TODO."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import torch

from peer.kv_cache.arena import Arena
from peer.kv_cache.slots import Run
from peer.kv_cache.span_cache import SpanCache
from protocol.errors import (
    SessionLost,
    TooLong,
)

_PAGE = 16
"""Tokens of a row that are taken at a time."""


_ROOM = 1.25
"""Room that a session is given when it grows, as a multiple of the tokens that it needs."""


_WASTE = 1.3
"""Above this multiple of its tokens, and a page per row, a session gives memory back."""


class Memory(Protocol):
    """What a session takes its tokens from: all of a peer's, or a client's share."""

    @property
    def max_length(self) -> int:
        """Tokens that one session may hold."""

    @property
    def arena(self) -> Arena:
        """Where they lie."""

    @property
    def lock(self) -> threading.RLock:
        """Held while a session ends or begins a step."""

    def resize(self, run: Run, sizes: Sequence[int]) -> int:
        """Give `run` the first of `sizes` slots that can be had; returns where its contents are. Raises `PeerFull`."""

    def give_back(self, start: int, end: int) -> None:
        """Slots [start, end) belong to no run any more."""

    def release(self, run: Run) -> None:
        """`run` has ended."""


@dataclass(eq=False)
class Session:
    """One generation's state on this peer."""

    memory: Memory
    cache: SpanCache
    batch_size: int = 0
    number: int = 0
    """Of the last step run."""
    answer: torch.Tensor | None = None
    """Of the last step run, unless it was large: a repeated step is answered by it."""
    idle_since: float = inf
    """When its last step ended (`time.monotonic`); infinite before the first and during a step."""
    lost: bool = False
    """Its memory is gone, or goes when the step that is running has ended."""
    _run: Run = field(default_factory=Run)
    _is_running: bool = False

    def __post_init__(self) -> None:
        self.cache.move_into(self.memory.arena, self._run)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block this session need not give way."""
        self.idle_since = inf
        try:
            yield
        finally:
            self.idle_since = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """On the compute thread: within the block the memory stays, whoever closes this session. Raises `SessionLost`.

        Without it a run could be given to another session under the step that is writing to it.
        """
        with self.memory.lock:
            if self.lost:
                raise SessionLost("This session's memory went to others; send its tokens again.")
            self._is_running = True
        try:
            yield
        finally:
            with self.memory.lock:
                self._is_running = False
                if self.lost:
                    self._free()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The cache changes within the block. If that fails, some of its layers have changed: the session is lost."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def reserve(self, batch_size: int, length: int) -> None:
        """Make sure that the cache may grow to `length` tokens per row. Raises `TooLong`, `PeerFull`."""
        if length > self.memory.max_length:
            raise TooLong(
                f"A session of {length} tokens is longer than this peer allows ({self.memory.max_length}); "
                "shorten the prompt or use another peer."
            )
        if batch_size * length > self._run.size:
            self._resize(batch_size, length)

    def trim(self, batch_size: int, length: int) -> None:
        """Give back what `length` tokens per row do not need. The cache holds no more than these."""
        if self._run.size > batch_size * (length * _WASTE + _PAGE):
            self._resize(batch_size, length)

    def _resize(self, batch_size: int, length: int) -> None:
        roomy, paged = (_pages(tokens, self.memory.max_length) for tokens in (int(length * _ROOM), length))
        start, end, size = self._run.start, self._run.end, self._run.size
        source = self.memory.resize(self._run, [batch_size * tokens for tokens in (roomy, paged, length)])
        for layer in self.cache.arena_layers():
            layer.resettle(source, size)
        if self._run.start >= end or self._run.end <= start:
            self.memory.give_back(start, end)
        elif self._run.end < end:
            self.memory.give_back(self._run.end, end)

    def twin(self) -> "Session":
        """An empty session that may become a copy of this one."""
        return Session(self.memory, SpanCache(self.cache.config, self.cache.blocks))

    def copy_to(self, twin: "Session") -> None:
        """Make `twin` a copy that goes its own way. Raises `PeerFull`, `SessionLost`."""
        with self.in_use(), self.running(), twin.running():
            twin.reserve(self.batch_size, self.cache.seen)
            twin.cache = self.cache.copied_to(twin._run)
            twin.batch_size, twin.number, twin.answer = self.batch_size, self.number, self.answer
        twin.idle_since = self.idle_since

    def close(self) -> None:
        """Free the memory, as soon as no step is running."""
        with self.memory.lock:
            if not self.lost:
                self.lost = True
                if not self._is_running:
                    self._free()

    def _free(self) -> None:
        self.memory.release(self._run)
        self.answer = None
        self.cache.layers.clear()


def _pages(tokens: int, max_length: int) -> int:
    return min(-(-tokens // _PAGE) * _PAGE, max_length)
