"""Transformers' KV cache seen from the middle of a model: of its layers only those of a span are used."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from peer.kv_cache.arena import Arena, ArenaLayer
from peer.kv_cache.slots import Run
from protocol.tensors import KvPrefix, prefix_tokens


class SpanCache(DynamicCache):
    """A full-length cache of which only the blocks in `blocks` are used.

    The trunk asks block 0, or the first block of a kind, how long the cache is. When that block is not of this span,
    one of the span's blocks of the same kind answers.
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

    def mark(self) -> Callable[[], None] | None:
        """What takes the cache back to the tokens that it has now; `None` where a layer cannot go back.

        Only the arena's layers can without copies: they write behind the tokens that they have.
        """
        layers, seen = list(self.layers), self.seen
        own = self.arena_layers()
        if len(own) < len(self.blocks):
            return None
        sizes = [(layer.rows, layer.length) for layer in own]

        def go_back() -> None:
            self.layers[:], self.seen = layers, seen
            for layer, (rows, length) in zip(own, sizes, strict=True):
                layer.rows, layer.length = rows, length

        return go_back

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


def prefix_cache(config: PreTrainedConfig, blocks: range, prefix: KvPrefix) -> SpanCache:
    """A new cache that begins with a trainable prefix."""
    return fill(SpanCache(config, blocks), prefix)


def fill(cache: SpanCache, prefix: KvPrefix) -> SpanCache:
    """Put a prefix into an empty cache. Returns the cache."""
    for block, (key, value) in prefix.items():
        cache.update(key, value, block)
    cache.seen = prefix_tokens(prefix)
    return cache
