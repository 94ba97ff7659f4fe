"""TODO."""

import threading
import time
from collections.abc import Sequence
from math import inf

import torch

from peer.kv_cache.arena import Arena
from peer.kv_cache.session import Session
from peer.kv_cache.slots import Run, Slots
from protocol.errors import (
    PeerFull,
)


class CacheMemory:
    """The tokens that all sessions together may hold, and the most that one may: `total_tokens` slots of an arena.

    What is free can be had, if need be by moving other sessions' runs. When there is too little, the sessions that have
    lain idle the longest give way: their clients hold what is needed to make them again, if they are still there.

    Runs grow and move on the compute thread only, between steps. They end on any thread, but never under a step.
    """

    def __init__(self, total_tokens: int, max_length: int, idle_timeout: float, arena: Arena | None = None):
        self.total_tokens, self.max_length = total_tokens, max_length
        self.idle_timeout = idle_timeout
        self.arena = arena or Arena(0, {}, torch.device("cpu"))
        self.lock = threading.RLock()  # sessions end on the event loop, their steps run on the compute thread
        self._slots = Slots(total_tokens)
        self._sessions: set[Session] = set()

    @property
    def free_tokens(self) -> int:
        """Tokens of one row that are still to be had."""
        return self._slots.free

    def resize(self, run: Run, sizes: Sequence[int]) -> int:
        """Give `run` the first of `sizes` slots that can be had; the last is what it needs. Raises `PeerFull`.

        The run may lie elsewhere then. Returns where its contents begin: it is for the caller to copy them.
        """
        with self.lock:
            if sizes[-1] - run.size > self.free_tokens:
                self._reclaim(sizes[-1] - run.size)
            size = next(size for size in sizes if size - run.size <= self.free_tokens)
            moves, source = self._slots.resize(run, size)
        self.arena.move(moves)
        return source

    def give_back(self, start: int, end: int) -> None:
        """Slots [start, end) belong to no run any more."""
        with self.lock:  # nobody may be given them meanwhile
            self.arena.give_back(start, end)

    def release(self, run: Run) -> None:
        """`run` has ended."""
        with self.lock:
            self.arena.give_back(run.start, run.end)
            self._slots.release(run)

    def watch(self, session: "Session") -> None:
        """From now on `session` gives way when it lies idle."""
        with self.lock:
            self._sessions.add(session)

    def is_in_use(self, lately: float) -> bool:
        """Whether any session ended a step in the last `lately` seconds."""
        since = time.monotonic() - lately
        return any(since < session.idle_since < inf for session in self._sessions)

    def forget(self, session: "Session") -> None:
        """`session` has ended."""
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
