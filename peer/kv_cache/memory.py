"""The memory of all sessions' KV caches: who may have how much of it, and who gives way when there is too little."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import Protocol

import torch

from peer.kv_cache.arena import Arena
from peer.kv_cache.slots import Run, Slots
from protocol.errors import OverQuota, PeerFull


class Holder(Protocol):
    """What holds tokens and may be made to give them back: a session."""

    idle_since: float
    """When it was last in use (`time.monotonic`); infinite before and during use."""

    def close(self) -> None:
        """Give everything back, as soon as no step is running."""


class CacheMemory:
    """The tokens that all sessions together may hold, and the most that one may: `total_tokens` slots of an arena.

    What is free can be had, if need be by moving other sessions' runs. When there is too little, the sessions that have
    lain idle the longest give way: their clients hold what is needed to make them again, if they are still there.

    Runs grow and move on the compute thread only, between steps. They end on any thread, but never under a step.

    `limit`: tokens that the sessions of one owner may hold together; `None`: as many as there are.
    """

    def __init__(
        self,
        total_tokens: int,
        max_length: int,
        idle_timeout: float,
        arena: Arena | None = None,
        limit: int | None = None,
    ):
        self.total_tokens, self.max_length = total_tokens, max_length
        self.idle_timeout, self.limit = idle_timeout, limit
        self.arena = arena or Arena(0, {}, torch.device("cpu"))
        self.lock = threading.RLock()  # sessions end on the event loop, their steps run on the compute thread
        self._slots = Slots(total_tokens)
        self._held = Counter[str]()
        """Owner -> tokens."""
        self._sessions: set[Holder] = set()

    @property
    def free_tokens(self) -> int:
        """Tokens of one row that are still to be had."""
        return self._slots.free

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def held(self, owner: str) -> int:
        """Tokens that an owner's sessions hold."""
        return self._held[owner]

    def resize(self, run: Run, sizes: Sequence[int], owner: str) -> int:
        """Give `run` the first of `sizes` slots that can be had; the last is what it needs.

        The run may lie elsewhere then. Returns where its contents begin: it is for the caller to copy them. Raises
        `OverQuota`, `PeerFull`.
        """
        with self.lock:
            before = run.size
            sizes = self._within_limit(sizes, self._held[owner] - before)
            if sizes[-1] - before > self.free_tokens:
                self._reclaim(sizes[-1] - before)
            size = next(size for size in sizes if size - before <= self.free_tokens)
            moves, source = self._slots.resize(run, size)
            self._count(owner, size - before)
        self.arena.move(moves)
        return source

    def _within_limit(self, sizes: Sequence[int], others: int) -> Sequence[int]:
        """The sizes that a run may have whose owner holds `others` tokens in other runs."""
        if self.limit is None:
            return sizes
        if others + sizes[-1] > self.limit:
            raise OverQuota(
                f"One client may hold {self.limit} tokens in this peer's KV caches, and this one would hold "
                f"{others + sizes[-1]}; end other generations first, or use another peer."
            )
        return [size for size in sizes if others + size <= self.limit]

    def _count(self, owner: str, more: int) -> None:
        self._held[owner] += more
        if not self._held[owner]:
            del self._held[owner]

    def give_back(self, start: int, end: int) -> None:
        """Slots [start, end) belong to no run any more."""
        with self.lock:  # nobody may be given them meanwhile
            self.arena.give_back(start, end)

    def release(self, run: Run, owner: str) -> None:
        """`run` has ended."""
        with self.lock:
            self.arena.give_back(run.start, run.end)
            self._count(owner, -run.size)
            self._slots.release(run)

    def watch(self, session: Holder) -> None:
        """A session is open: from now on it gives way when it lies idle."""
        with self.lock:
            self._sessions.add(session)

    def is_in_use(self, lately: float) -> bool:
        """Whether any session ended a step in the last `lately` seconds."""
        since = time.monotonic() - lately
        return any(since < session.idle_since < inf for session in self._sessions)

    def forget(self, session: Holder) -> None:
        """A session has ended."""
        with self.lock:
            self._sessions.discard(session)

    def _reclaim(self, slots: int) -> None:
        long_ago = time.monotonic() - self.idle_timeout
        idle = sorted((s for s in self._sessions if s.idle_since < long_ago), key=lambda s: s.idle_since)
        for session in idle:
            if slots <= self.free_tokens:
                return
            session.close()
        if slots > self.free_tokens:
            raise PeerFull(
                f"This peer's KV cache has {self.free_tokens} of {self.total_tokens} tokens free, "
                f"{slots} more are needed; try again later or use another peer."
            )
