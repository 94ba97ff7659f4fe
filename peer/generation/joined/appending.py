"""New tokens of a packed pass, put into the arena in one go: two operations for a block, however many the sessions.

One by one it would be two for each, and in a decode step a GPU's operation takes longer to be begun than to be done.
"""

from collections.abc import Sequence
from typing import Any

import torch

from peer.generation.joined.batched_pass import BatchMember
from peer.kv_cache.arena import ArenaLayer
from peer.span.transfer import to_device

_MOST = 64
"""Tokens in one pass that are written so. With more, it is the copying that takes the time; scattering takes more."""


class Appender:
    """Writes the tokens of a pass's members, block after block: in every block they go to the same places."""

    def __init__(self, members: Sequence[BatchMember]):
        self._members = members
        self._key: object = None
        self._places = torch.empty(0)

    def write(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Write keys and values (1, heads, all tokens, head size) of a block.

        The members' layers are still to be told. Returns whether it was done: not where there are many tokens, where a
        member has failed, or has a layer of another kind.
        """
        layers: list[Any] = [member.cache.layers[block] for member in self._members]
        if len(layers) == 1 or keys.shape[2] > _MOST or not _can_write(layers[0], keys, values):
            return False
        pairs = list(zip(layers, self._members, strict=True))
        if not all(_can_join(layers[0], *pair) for pair in pairs):
            return False
        key = [(layer.run.start, layer.run.size, layer.length) for layer in layers]
        if key != self._key:
            places = torch.cat([layer.places(member.rows, member.tokens) for layer, member in pairs])
            self._key, self._places = key, to_device(places.flatten(), keys.device)
        layers[0].write(self._places, keys, values)
        return True


def _can_write(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> bool:
    return isinstance(layer, ArenaLayer) and layer.keeps(keys, values)


def _can_join(first: ArenaLayer, layer: Any, member: BatchMember) -> bool:
    """Whether a member's tokens can go along with those of the first one."""
    return not member.error and first.is_beside(layer) and layer.has_room(member.rows, member.tokens)
