"""The memory of a peer's KV caches: one tensor for the keys and one for the values of each block, allocated once.

A session's caches are views of it. A step writes its keys and values in place; Transformers' own layers would copy the
whole context at every step. Within a session's run of slots a block's keys lie as (rows, heads, capacity, head size):
attention kernels take a view of the first tokens as if it were contiguous. With the heads of one token side by side,
attention of one new token takes two to three times as long in bfloat16 (measured).
"""

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peer.kv_cache.slots import Move, Run

_SCRATCH = 2**22
"""Bytes copied at a time when runs are slid together. They are had from the first: where memory lacked in the middle,
other sessions' tokens would be lost without a word."""
_WORTH_RETURNING = 2**16
"""Bytes of a tensor: where freed slots take fewer, they are not given back to the operating system."""


@dataclass(frozen=True)
class Shape:
    """What a block caches for one token: heads, the size of one, dtype."""

    heads: int
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, cached: torch.Tensor) -> "Shape":
        """The shape of keys or values (rows, heads, tokens, head size)."""
        return cls(cached.shape[1], cached.shape[3], cached.dtype)

    @property
    def sizes(self) -> tuple[int, int]:
        """Heads, and the size of one."""
        return self.heads, self.size


class _Store:
    """The keys or the values of one block: slots of one token of one row each."""

    def __init__(self, slots: int, shape: Shape, device: torch.device):
        self.shape = shape
        self._width = shape.heads * shape.size
        self._pages: mmap.mmap | None = None
        if device.type == "cpu":
            self._pages = _reserve(slots * self._width * shape.dtype.itemsize)
            self._flat = torch.frombuffer(self._pages, dtype=shape.dtype, count=slots * self._width)
        else:
            self._flat = torch.empty(slots * self._width, dtype=shape.dtype, device=device)

    def view(self, start: int, rows: int, capacity: int, length: int) -> torch.Tensor:
        """The first `length` tokens of a run at `start`: (rows, heads, length, head size)."""
        size, row = self.shape.size, capacity * self._width
        shape = (rows, self.shape.heads, length, size)
        return self._flat.as_strided(shape, (row, capacity * size, size, 1), start * self._width)

    @property
    def slot_bytes(self) -> int:
        """Of one slot."""
        return self._width * self.shape.dtype.itemsize

    def put(self, places: torch.Tensor, states: torch.Tensor) -> None:
        """Write (1, heads, tokens, head size) to `places`, (tokens x heads,): heads counted from the arena's begin."""
        rows = states[0].transpose(0, 1).reshape(-1, self.shape.size)  # most often no copy: so they leave the layer
        self._flat.view(-1, self.shape.size)[places] = rows

    def move(self, move: Move, scratch: torch.Tensor) -> None:
        """Copy slots to a place that may overlap their own, by way of `scratch`: bytes, of one slot at least."""
        chunk = len(scratch) // self.slot_bytes
        begins = range(0, move.size, chunk)
        for begin in begins if move.target < move.source else reversed(begins):
            count = min(chunk, move.size - begin)
            copy = scratch[: count * self.slot_bytes].view(self.shape.dtype)
            self._slots(move.target + begin, count).copy_(copy.copy_(self._slots(move.source + begin, count)))

    def _slots(self, start: int, count: int) -> torch.Tensor:
        return self._flat.narrow(0, start * self._width, count * self._width)

    def give_back(self, start: int, end: int) -> None:
        """Have the operating system take the pages that lie wholly in slots [start, end): they are free."""
        slot = self.slot_bytes
        begin = -(-start * slot // mmap.PAGESIZE) * mmap.PAGESIZE
        size = end * slot // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if self._pages is not None and size >= _WORTH_RETURNING:
            self._pages.madvise(mmap.MADV_DONTNEED, begin, size)


def _reserve(size: int) -> mmap.mmap:
    """Zeroed memory that takes room only once it is written to, page by page."""
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a kernel without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # or a first token would take 2 MB of every block
    return pages


class Arena:
    """`slots` slots of the blocks in `shapes`: block -> shapes of keys and of values.

    Raises OSError or `torch.OutOfMemoryError` where there is no such memory.
    """

    def __init__(self, slots: int, shapes: Mapping[int, tuple[Shape, Shape]], device: torch.device):
        self._stores = {
            block: (_Store(slots, keys, device), _Store(slots, values, device))
            for block, (keys, values) in shapes.items()
        }
        slot = max((store.slot_bytes for pair in self._stores.values() for store in pair), default=0)
        self._scratch = torch.empty(min(max(_SCRATCH, slot), slots * slot), dtype=torch.uint8, device=device)

    def move(self, moves: Sequence[Move]) -> None:
        """Copy what lies in slots, one move after the other."""
        for move in moves:
            for pair in self._stores.values():
                for store in pair:
                    store.move(move, self._scratch)

    def give_back(self, start: int, end: int) -> None:
        """Slots [start, end) are free: they need not take memory."""
        for pair in self._stores.values():
            for store in pair:
                store.give_back(start, end)

    def layer(self, block: int, plain: Any, run: Run) -> Any:
        """A layer that keeps its tokens in `run`, in place of Transformers' layer `plain`; `plain` where it must stay.

        It must stay when it is not empty, or of a kind, or a block, that the arena has nothing for.
        """
        if block not in self._stores or plain.is_initialized:
            return plain
        if type(plain) is DynamicLayer:
            return ArenaLayer(*self._stores[block], run)
        if type(plain) is DynamicSlidingWindowLayer:
            return ArenaSlidingLayer(*self._stores[block], run, plain.sliding_window)
        return plain


class ArenaLayer(DynamicLayer):
    """Transformers' `DynamicLayer`, its keys and values in a run of an arena. All layers of a session share the run."""

    def __init__(self, key_store: _Store, value_store: _Store, run: Run):
        # The base class's would set `keys` and `values`, which are computed here.
        self.is_initialized = True
        self.run, self.rows, self.length = run, 0, 0
        self._stores = (key_store, value_store)
        self._shapes = (key_store.shape, value_store.shape)

    @property
    def capacity(self) -> int:
        """Tokens per row that the run has room for."""
        return self.run.size // max(self.rows, 1)

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """(rows, heads, tokens, head size); a view, good until the run changes."""
        return self._stores[0].view(self.run.start, self.rows, self.capacity, self.length)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """(rows, heads, tokens, head size); a view, good until the run changes."""
        return self._stores[1].view(self.run.start, self.rows, self.capacity, self.length)

    def takes(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these can be kept here, and read again exactly as from Transformers' own layer."""
        mine, theirs = self._shapes
        if keys.dtype == mine.dtype and values.dtype == theirs.dtype:
            return self.length > 0 or [Shape.of(keys), Shape.of(values)] == [mine, theirs]
        if not self.length:
            return False
        return _holds(mine.dtype, keys.dtype) and _holds(theirs.dtype, values.dtype)

    def keeps(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these can be written to `places`, those of keys and of values being the same."""
        return tuple(map(Shape.of, (keys, values))) == self._shapes and keys.shape[1] == values.shape[1]

    def is_beside(self, layer: Any) -> bool:
        """Whether another layer is one of the same block of the same arena."""
        return isinstance(layer, ArenaLayer) and layer._stores == self._stores

    def has_room(self, rows: int, count: int) -> bool:
        """Whether `count` more tokens of each of `rows` rows fit."""
        return self.length + count <= self.run.size // rows and (not self.length or rows == self.rows)

    def places(self, rows: int, count: int) -> torch.Tensor:
        """Where the next `count` tokens of each row go: (rows x count, heads), heads counted from the arena's begin."""
        heads, capacity = self._shapes[0].heads, self.run.size // rows
        tokens = torch.arange(rows)[:, None] * (heads * capacity) + torch.arange(self.length, self.length + count)
        return self.run.start * heads + tokens.reshape(-1, 1) + torch.arange(heads) * capacity

    def write(self, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write (1, heads, tokens, head size) of all sessions whose places these are, one after the other."""
        for store, states in zip(self._stores, (keys, values), strict=True):
            store.put(places, states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, written: bool = False, **kwargs: Any
    ) -> Any:
        """Append (rows, heads, tokens, head size); returns views of all keys and values.

        `written`: they are where they belong already. Raises RuntimeError where the run has not been made large enough
        before.
        """
        rows, _, count, _ = key_states.shape
        begin, end = self.length, self.length + count
        capacity = self.run.size // rows
        if not self.has_room(rows, count):
            raise RuntimeError(f"{rows} x {end} tokens do not fit a run of {self.run.size} slots")
        self.rows, self.length = rows, end
        keys, values = (store.view(self.run.start, rows, capacity, end) for store in self._stores)
        if not written:
            keys.narrow(2, begin, count).copy_(key_states)
            values.narrow(2, begin, count).copy_(value_states)
        return self._visible(keys, values, count)

    def _visible(self, keys: torch.Tensor, values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop `-tokens_to_remove` tokens from the end."""
        self.length -= min(abs(tokens_to_remove), self.length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the rows in another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows, as often as they are named. The run must have room for them."""
        if self.length:
            self._rearrange(self.run.start, self.run.size, self.run, indices)
            self.rows = len(indices)

    def resettle(self, start: int, size: int) -> None:
        """The run has changed; the tokens still lie as in a run of `size` slots from `start` on."""
        if self.length:
            self._rearrange(start, size, self.run)

    def _rearrange(self, start: int, size: int, target: Run, indices: torch.Tensor | None = None) -> None:
        rows = self.rows if indices is None else len(indices)
        for store in self._stores:
            held = store.view(start, self.rows, size // self.rows, self.length)
            if indices is not None:
                held = held.index_select(0, indices.to(held.device))
            elif start < target.end and target.start < start + size:
                held = held.clone()
            store.view(target.start, rows, target.size // rows, self.length).copy_(held)

    def copied_to(self, run: Run) -> "ArenaLayer":
        """A layer with the same tokens in another run, which must have room for them."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, run=run)
        if self.length:
            self._rearrange(self.run.start, self.run.size, run)
        return twin

    def moved_out(self) -> DynamicLayer:
        """Transformers' own layer with the same tokens."""
        return self._fill(DynamicLayer())

    def _fill(self, plain: DynamicLayer) -> DynamicLayer:
        if self.length:
            plain.update(self.keys, self.values)
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicLayer:
        """A copy has no run of its own: it is Transformers' own layer. `copied_to` copies within the arena."""
        return self.moved_out()


class ArenaSlidingLayer(ArenaLayer, DynamicSlidingWindowLayer):
    """Transformers' `DynamicSlidingWindowLayer`. It keeps every token, so that it can always be cropped."""

    def __init__(self, key_store: _Store, value_store: _Store, run: Run, sliding_window: int):
        super().__init__(key_store, value_store, run)
        self.sliding_window, self.record_past = sliding_window, False

    @property
    def cumulative_length(self) -> int:  # type: ignore[override]
        """Tokens so far."""
        return self.length

    def _visible(self, keys: torch.Tensor, values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens and what the first of them sees."""
        visible = min(self.length, self.sliding_window - 1 + count)
        first = self.length - visible
        return keys.narrow(2, first, visible), values.narrow(2, first, visible)

    def moved_out(self) -> DynamicLayer:
        """Transformers' own layer with the same tokens."""
        plain = DynamicSlidingWindowLayer(self.sliding_window)
        plain.record_past = self.record_past
        return self._fill(plain)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) == wide
