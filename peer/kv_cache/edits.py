"""A client's edits of its session's KV cache: read from a step, and applied to the layers."""

from collections.abc import Sequence

from peer.kv_cache.span_cache import SpanCache
from protocol import swarm_pb2 as pb
from protocol.cache_edits import Edit, read_edit
from protocol.errors import BadRequest

_MAX_EDITS = 256


def read_edits(messages: Sequence[pb.CacheEdit]) -> list[Edit]:
    """The edits of one step. Raises `BadRequest` for too many of them, and for an unknown kind."""
    if len(messages) > _MAX_EDITS:
        raise BadRequest(f"A step has {len(messages)} cache edits; at most {_MAX_EDITS}.")
    return [read_edit(message) for message in messages]


def tokens_after(edits: Sequence[Edit], tokens: int) -> int:
    """Tokens per row of a cache of `tokens` tokens after `edits`. Raises `BadRequest` when one does not fit."""
    for edit in edits:
        tokens = edit.tokens(tokens)
    return tokens


def apply_edit(cache: SpanCache, edit: Edit) -> None:
    """Edit the layers of this peer's blocks. The edit must fit the cache, and the cache's memory its result."""
    for layer in cache.own_layers():
        edit.layer(layer)
    cache.seen = edit.tokens(cache.seen)
