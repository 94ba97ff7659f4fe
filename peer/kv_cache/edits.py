"""TODO."""

from collections.abc import Sequence

import torch

from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from protocol import swarm_pb2 as pb
from protocol.errors import (
    BadRequest,
)

_MAX_ROWS = 4096


_MAX_EDITS = 256


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
