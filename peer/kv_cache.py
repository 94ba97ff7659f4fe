"""Sessions' KV caches: bounded memory, edits, and Transformers' cache seen from the middle of a model."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from protocol import swarm_pb2 as pb
from protocol.errors import BadRequest, PeerFull, TooLong

_PAGE = 64
_MAX_ROWS = 4096
_MAX_EDITS = 256


class SpanCache(DynamicCache):
    """A full-length cache of which only the blocks in `blocks` are used.

    The trunk asks it for lengths by way of block 0 or the first block of a kind; such questions about foreign blocks
    are answered by a block of our own of the same kind.
    """

    def __init__(self, config: PreTrainedConfig, blocks: range):
        super().__init__(config=config)
        self.blocks = blocks
        self.seen = 0
        """Tokens so far: all that linear-attention layers know of the length."""

    def own_layers(self) -> list[Any]:
        """The layers of this span's blocks."""
        return [self.layers[i] for i in self.blocks]

    def _stand_in(self, index: int) -> int:
        linear, sliding = self.is_linear, self.is_sliding
        attention = [i for i in self.blocks if not linear[i]]
        if index in attention:
            return index
        return next((i for i in attention if sliding[i] == sliding[index]), attention[0])

    def _only_linear(self) -> bool:
        return all(self.is_linear[i] for i in self.blocks)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return self.seen if self._only_linear() else super().get_seq_length(self._stand_in(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys for a mask."""
        if self._only_linear():
            return self.seen + query_length, 0
        return super().get_mask_sizes(query_length, self._stand_in(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the next query begins."""
        return self.seen if self._only_linear() else super().get_query_offset(self._stand_in(layer_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether linear-attention layers have state already."""
        if layer_idx is not None:
            return super().has_previous_state(layer_idx, state_idx)
        linear = [i for i in self.blocks if hasattr(self.layers[i], "has_previous_state")]
        return super().has_previous_state(linear[-1], state_idx) if linear else False


def check_edits(session: "Session", edits: Sequence[pb.CacheEdit]) -> tuple[int, int]:
    """How many tokens and rows a session's cache will have after `edits`; its memory is reserved.

    Raises `BadRequest` for edits that do not fit it, `TooLong`, `PeerFull`.
    """
    if len(edits) > _MAX_EDITS:
        raise BadRequest(f"A step has {len(edits)} cache edits; at most {_MAX_EDITS}.")
    seen, rows = session.cache.seen, session.batch_size
    for edit in edits:
        seen, rows = _edited(edit, seen, rows)
        session.reserve(rows, seen)
    return seen, rows


def _edited(edit: pb.CacheEdit, seen: int, rows: int) -> tuple[int, int]:
    """Tokens and rows of a cache after an edit."""
    kind = edit.WhichOneof("edit")
    if kind == "crop":
        if edit.crop > seen:
            raise BadRequest(f"Cannot crop {edit.crop} tokens from a cache of {seen}.")
        return seen - edit.crop, rows
    if kind == "repeat_interleave":
        if not 0 < edit.repeat_interleave * rows <= _MAX_ROWS:
            raise BadRequest(f"Cannot repeat {rows} rows {edit.repeat_interleave} times; at most {_MAX_ROWS} rows.")
        return seen, rows * edit.repeat_interleave
    if kind not in ("reorder", "select"):
        raise BadRequest("An unknown cache edit; the two ends run different versions.")
    index = _rows(edit)
    fits = len(index) == rows if kind == "reorder" else 0 < len(index) <= _MAX_ROWS
    if not fits or max(index, default=rows) >= rows:
        raise BadRequest(f"A cache {kind} to rows {index[:8]} does not fit a batch of {rows}.")
    return seen, len(index)


def apply_edit(cache: SpanCache, edit: pb.CacheEdit) -> None:
    """Apply a client's edit, which has been checked."""
    kind = edit.WhichOneof("edit")
    if kind == "crop":
        cache.seen -= edit.crop
    for layer in cache.own_layers():
        if kind == "crop":
            layer.crop(-edit.crop)
        elif kind == "repeat_interleave":
            layer.batch_repeat_interleave(edit.repeat_interleave)
        elif kind == "reorder":
            layer.reorder_cache(torch.tensor(_rows(edit)))
        else:
            layer.batch_select_indices(torch.tensor(_rows(edit)))


def _rows(edit: pb.CacheEdit) -> list[int]:
    return list(edit.reorder.index if edit.HasField("reorder") else edit.select.index)


def prefix_cache(
    config: PreTrainedConfig, blocks: range, prefix: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> SpanCache:
    """A cache that begins with a trainable prefix: block -> (key, value), each (batch, heads, tokens, head size)."""
    cache = SpanCache(config, blocks)
    for block, (key, value) in prefix.items():
        cache.update(key, value, block)
    cache.seen = next(iter(prefix.values()))[0].shape[2] if prefix else 0
    return cache


class CacheMemory:
    """The tokens that all sessions together may hold, and the most that one may.

    When there are too few, the sessions that have lain idle the longest give way: their clients hold what is needed to
    make them again, if they are still there.
    """

    def __init__(self, total_tokens: int, max_length: int, idle_timeout: float):
        self.total_tokens, self.max_length = total_tokens, max_length
        self.idle_timeout = idle_timeout
        self._taken = 0
        self._lock = threading.RLock()  # sessions end on the event loop, their steps run on the compute thread
        self._sessions: set[Session] = set()

    @property
    def free_tokens(self) -> int:
        """Tokens of one row that are still to be had."""
        return self.total_tokens - self._taken

    def take(self, tokens: int) -> None:
        """Reserve. Raises `PeerFull`."""
        with self._lock:
            if tokens > self.free_tokens:
                self._reclaim(tokens)
            self._taken += tokens

    def give_back(self, tokens: int) -> None:
        """Release what was taken."""
        with self._lock:
            self._taken -= tokens

    def watch(self, session: "Session") -> None:
        """From now on `session` gives way when it lies idle."""
        self._sessions.add(session)

    def is_in_use(self, lately: float) -> bool:
        """Whether any session ended a step in the last `lately` seconds."""
        since = time.monotonic() - lately
        return any(since < session.idle_since < inf for session in self._sessions)

    def forget(self, session: "Session") -> None:
        """`session` has ended."""
        self._sessions.discard(session)

    def _reclaim(self, tokens: int) -> None:
        long_ago = time.monotonic() - self.idle_timeout
        idle = sorted((s for s in self._sessions if s.idle_since < long_ago), key=lambda s: s.idle_since)
        for session in idle:
            if tokens <= self.free_tokens:
                return
            session.close()
        if tokens > self.free_tokens:
            raise PeerFull(
                f"This peer's KV cache has {self.free_tokens} of {self.total_tokens} tokens free, "
                f"{tokens} more are needed; try again later or use another peer."
            )


class Memory(Protocol):
    """What a session takes its tokens from: all of a peer's, or a client's share."""

    @property
    def max_length(self) -> int:
        """Tokens that one session may hold."""

    def take(self, tokens: int) -> None:
        """Reserve. Raises `PeerFull`."""

    def give_back(self, tokens: int) -> None:
        """Release what was taken."""


@dataclass(eq=False)
class Session:
    """One generation's state on this peer."""

    memory: Memory
    cache: SpanCache
    batch_size: int = 0
    number: int = 0
    """Of the last step run."""
    answer: torch.Tensor | None = None
    """Of the last step run: a repeated step is answered by it."""
    idle_since: float = inf
    """When its last step ended (`time.monotonic`); infinite before the first and during a step."""
    lost: bool = False
    """Its memory is gone."""
    _reserved: int = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block this session need not give way."""
        self.idle_since = inf
        try:
            yield
        finally:
            self.idle_since = time.monotonic()

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
        needed = batch_size * -(-length // _PAGE) * _PAGE
        if needed > self._reserved:
            self.memory.take(needed - self._reserved)
            self._reserved = needed

    def fork(self) -> "Session":
        """A copy that goes its own way. Raises `PeerFull`."""
        with self.in_use():
            self.memory.take(self._reserved)
            twin = copy.copy(self)
            twin.cache = copy.deepcopy(self.cache)
        twin.idle_since = self.idle_since
        return twin

    def close(self) -> None:
        """Free the memory."""
        self.memory.give_back(self._reserved)
        self._reserved = 0
        self.lost = True
        self.answer = None
        self.cache.layers.clear()


def bytes_per_token(caches: Sequence[SpanCache], tokens: int) -> int:
    """Bytes that one token of one row takes in caches of one row and `tokens` tokens."""
    total = 0
    for cache in caches:
        for layer in cache.own_layers():
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                total += tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
    return max(1, -(-total // tokens))
