"""One generation's state on a peer: its cache, the memory that it holds, and the last step."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

import torch

from peer.kv_cache.edits import apply_edit
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.slots import Run
from peer.kv_cache.span_cache import SpanCache, fill
from protocol.cache_edits import Edit
from protocol.errors import BadRequest, SessionLost, TooLong
from protocol.tensors import KvPrefix, prefix_tokens

_PAGE = 16
"""Tokens of a row that are taken at a time."""
_ROOM = 1.25
"""Room that a session is given when it grows, as a multiple of the tokens that it needs."""
_WASTE = 1.3
"""Above this multiple of its tokens, and a page per row, a session gives memory back."""


@dataclass(eq=False)
class Session:
    """One generation's state on this peer."""

    memory: CacheMemory
    cache: SpanCache
    owner: str = ""
    """Its client; `CacheMemory.limit` counts what the sessions of one owner hold."""
    rows: int = 0
    """Of the cache; 0 before the first step."""
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

    def prepare(self, edits: Sequence[Edit], rows: int, tokens: int, prefix: KvPrefix, keep_past: bool = False) -> None:
        """Edit the cache for a step of `rows` rows, and make room for its `tokens` new tokens.

        `prefix` comes before the tokens of a first step. `keep_past`: layers with sliding windows stay croppable.

        Raises `BadRequest` when edits or rows do not fit the cache, `TooLong`, `OverQuota` and `PeerFull` when the
        tokens cannot be had: the cache is as it was then. Whatever else is raised leaves the session lost.
        """
        own_rows, length = self.rows, self.cache.seen
        for edit in edits:
            own_rows, length = edit.rows(own_rows), edit.tokens(length)
            self.reserve(own_rows, length)
        if self.number and rows != own_rows:
            raise BadRequest(f"The step has {rows} rows, its session {own_rows}.")
        length += tokens + (prefix_tokens(prefix) if prefix else 0)
        self.reserve(rows, length)
        with self.changing():
            for edit in edits:
                apply_edit(self.cache, edit)
            self.rows = rows
            if self._run.size > rows * (length * _WASTE + _PAGE):
                self._resize(rows, length)
            if prefix:
                fill(self.cache, prefix)
            if keep_past:
                self.cache.activate_past_recording()

    def reserve(self, rows: int, length: int) -> None:
        """Make sure that the cache may grow to `length` tokens per row. Raises `TooLong`, `OverQuota`, `PeerFull`."""
        if length > self.memory.max_length:
            raise TooLong(
                f"A session of {length} tokens is longer than this peer allows ({self.memory.max_length}); "
                "shorten the prompt or use another peer."
            )
        if rows * length > self._run.size:
            self._resize(rows, length)

    def _resize(self, rows: int, length: int) -> None:
        roomy, paged = (_pages(tokens, self.memory.max_length) for tokens in (int(length * _ROOM), length))
        start, end, size = self._run.start, self._run.end, self._run.size
        source = self.memory.resize(self._run, [rows * tokens for tokens in (roomy, paged, length)], self.owner)
        with self.changing():
            for layer in self.cache.arena_layers():
                layer.resettle(source, size)
        if self._run.start >= end or self._run.end <= start:
            self.memory.give_back(start, end)
        elif self._run.end < end:
            self.memory.give_back(self._run.end, end)

    def twin(self) -> "Session":
        """An empty session that may become a copy of this one."""
        return Session(self.memory, SpanCache(self.cache.config, self.cache.blocks), self.owner)

    def copy_to(self, twin: "Session") -> None:
        """Make `twin` a copy that goes its own way. Raises `OverQuota`, `PeerFull`, `SessionLost`."""
        with self.in_use(), self.running(), twin.running():
            twin.reserve(self.rows, self.cache.seen)
            twin.cache = self.cache.copied_to(twin._run)
            twin.rows, twin.number, twin.answer = self.rows, self.number, self.answer
        twin.idle_since = self.idle_since

    def close(self) -> None:
        """Free the memory, as soon as no step is running."""
        with self.memory.lock:
            if not self.lost:
                self.lost = True
                if not self._is_running:
                    self._free()

    def _free(self) -> None:
        self.memory.release(self._run, self.owner)
        self.answer = None
        self.cache.layers.clear()


def _pages(tokens: int, max_length: int) -> int:
    return min(-(-tokens // _PAGE) * _PAGE, max_length)
