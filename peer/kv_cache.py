"""Sessions' KV caches: bounded memory, edits, and Transformers' cache seen from the middle of a model."""

import copy
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from peer.arena import Arena, ArenaLayer
from peer.slots import Run, Slots
from protocol import swarm_pb2 as pb
from protocol.errors import BadRequest, PeerFull, SessionLost, TooLong

_PAGE = 16
"""Tokens of a row that are taken at a time."""
_ROOM = 1.25
"""Room that a session is given when it grows, as a multiple of the tokens that it needs."""
_WASTE = 1.3
"""Above this multiple of its tokens, and a page per row, a session gives memory back."""
_MAX_ROWS = 4096
_MAX_EDITS = 256


class SpanCache(DynamicCache):
    """A full-length cache of which only the blocks in `blocks` are used.

    The trunk asks it for lengths by way of block 0 or the first block of a kind; such questions about foreign blocks
    are answered by a block of our own of the same kind.
    """

    def __init__(self, config: PreTrainedConfig, blocks: range):
        super().__init__(config=config)
        self.config, self.blocks = config, blocks
        self.seen = 0
        """Tokens so far: all that linear-attention layers know of the length."""
        self._is_linear, self._is_sliding = super().is_linear, super().is_sliding
        self._stand_ins = self._find_stand_ins()

    # Asked at every step, of all layers of the model; a layer's kind never changes.

    @property
    def is_linear(self) -> list[bool]:
        """Block -> whether it is linear attention only."""
        return self._is_linear

    @property
    def is_sliding(self) -> list[bool]:
        """Block -> whether it has a sliding window."""
        return self._is_sliding

    def own_layers(self) -> list[Any]:
        """The layers of this span's blocks."""
        return [self.layers[i] for i in self.blocks]

    def arena_layers(self) -> list[ArenaLayer]:
        """Those of them that keep their tokens in the peer's arena."""
        return [layer for layer in self.own_layers() if isinstance(layer, ArenaLayer)]

    def move_into(self, arena: Arena, run: Run) -> None:
        """Keep tokens in `run` of `arena` from now on, where a block's kind of layer allows it."""
        for block in self.blocks:
            self.layers[block] = arena.layer(block, self.layers[block], run)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Append keys and values (rows, heads, tokens, head size) of a block; returns all that it attends to."""
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, ArenaLayer) and not layer.takes(key_states, value_states):  # autocast, an adapter's dtype
            layer = self.layers[layer_idx] = layer.moved_out()
        return layer.update(key_states, value_states, *args, **kwargs)

    def copied_to(self, run: Run) -> "SpanCache":
        """A copy whose tokens in the arena lie in `run`, which has room for them."""
        twin = copy.copy(self)
        twin.layers = [
            layer.copied_to(run) if isinstance(layer, ArenaLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return twin

    def _find_stand_ins(self) -> list[int]:
        """Block -> the block of ours that answers questions about it; empty if all of ours are linear attention."""
        linear, sliding = self.is_linear, self.is_sliding
        attention = [block for block in self.blocks if not linear[block]]
        of_kind = {sliding[block]: block for block in reversed(attention)}
        if not attention:
            return []
        return [
            block if block in attention else of_kind.get(sliding[block], attention[0]) for block in range(len(linear))
        ]

    def _asked(self, block: int) -> Any:
        return self.layers[self._stand_ins[block]]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return self._asked(layer_idx).get_seq_length() if self._stand_ins else self.seen  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys for a mask."""
        if not self._stand_ins:
            return self.seen + query_length, 0
        return self._asked(layer_idx).get_mask_sizes(query_length)  # type: ignore[no-any-return]

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
    return fill(SpanCache(config, blocks), prefix)


def fill(cache: SpanCache, prefix: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> SpanCache:
    """Put a prefix into an empty cache: block -> (key, value), as for `prefix_cache`. Returns the cache."""
    for block, (key, value) in prefix.items():
        cache.update(key, value, block)
    cache.seen = next(iter(prefix.values()))[0].shape[2] if prefix else 0
    return cache


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
