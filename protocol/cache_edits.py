"""Edits of a KV cache before a step: what each does to the cache's shape, to a layer of it, and to tensors beside it.

A peer edits its caches. A client does the same to the hidden states that it remembers, from which another peer could
make the cache again. Both ask here, so that they agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from protocol import swarm_pb2 as pb
from protocol.errors import BadRequest

MAX_ROWS = 4096
"""Rows that an edit may give a cache."""


class Edit:
    """An edit that changes nothing. Each kind of edit says what it changes."""

    def rows(self, rows: int) -> int:
        """Rows of a cache of `rows` rows afterwards. Raises `BadRequest` when the edit does not fit it."""
        return rows

    def tokens(self, tokens: int) -> int:
        """Tokens of a cache of `tokens` tokens per row afterwards. Raises `BadRequest` when it does not fit."""
        return tokens

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor (rows, tokens, ...) that belongs to the cache's tokens."""
        raise NotImplementedError

    def layer(self, layer: Any) -> None:
        """Edit a layer of a Transformers cache, in place."""
        raise NotImplementedError


@dataclass(frozen=True)
class Crop(Edit):
    """Drop tokens from the end."""

    count: int

    def tokens(self, tokens: int) -> int:
        """See `Edit.tokens`."""
        if self.count > tokens:
            raise BadRequest(f"Cannot crop {self.count} tokens from a cache of {tokens}.")
        return tokens - self.count

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Edit.tensor`."""
        return tensor[:, : max(0, tensor.shape[1] - self.count)]

    def layer(self, layer: Any) -> None:
        """See `Edit.layer`."""
        layer.crop(-self.count)


@dataclass(frozen=True)
class Repeat(Edit):
    """Repeat every row so many times."""

    times: int

    def rows(self, rows: int) -> int:
        """See `Edit.rows`."""
        if not 0 < self.times * rows <= MAX_ROWS:
            raise BadRequest(f"Cannot repeat {rows} rows {self.times} times; at most {MAX_ROWS} rows.")
        return self.times * rows

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Edit.tensor`."""
        return tensor.repeat_interleave(self.times, 0)

    def layer(self, layer: Any) -> None:
        """See `Edit.layer`."""
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            rows: Any = torch.arange(_rows_of(layer)).repeat_interleave(self.times)
            layer.reorder_cache(rows)
        else:
            layer.batch_repeat_interleave(self.times)


@dataclass(frozen=True)
class Select(Edit):
    """Keep the rows of `index`, as often as they are named there."""

    index: Sequence[int]

    def rows(self, rows: int) -> int:
        """See `Edit.rows`."""
        if not self._has_fitting_length(rows) or max(self.index, default=rows) >= rows:
            kind = type(self).__name__.lower()
            raise BadRequest(f"A cache {kind} to rows {list(self.index[:8])} does not fit a batch of {rows}.")
        return len(self.index)

    def _has_fitting_length(self, rows: int) -> bool:
        return 0 < len(self.index) <= MAX_ROWS

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Edit.tensor`."""
        return tensor[list(self.index)]

    def layer(self, layer: Any) -> None:
        """See `Edit.layer`."""
        # All kinds of layers have this one, and none asks whether there are as many rows as before.
        layer.reorder_cache(torch.tensor(list(self.index)))


@dataclass(frozen=True)
class Reorder(Select):
    """Put other rows, or the same in another order, in the place of all rows (beam search)."""

    def _has_fitting_length(self, rows: int) -> bool:
        return len(self.index) == rows


def _rows_of(layer: LinearAttentionCacheLayerMixin) -> int:
    """Rows of a linear-attention layer; 0 before its first tokens."""
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return next((len(state) for state in states if state is not None), 0)


def read_edit(message: pb.CacheEdit) -> Edit:
    """The edit that a message describes. Raises `BadRequest` for one that this version does not know."""
    kind = message.WhichOneof("edit")
    if kind is None:
        raise BadRequest("An unknown cache edit; the two ends run different versions.")
    return _KINDS[kind](message)


_KINDS: dict[str, Callable[[pb.CacheEdit], Edit]] = {
    "crop": lambda message: Crop(message.crop),
    "repeat_interleave": lambda message: Repeat(message.repeat_interleave),
    "reorder": lambda message: Reorder(message.reorder.index),
    "select": lambda message: Select(message.select.index),
}
