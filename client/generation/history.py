"""What was sent into a span during a generation, so that its KV cache can be made again elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protocol import swarm_pb2 as pb
from protocol.cache_edits import read_edit

_COMPACT_AFTER = 64
"""Events after which they are put together to one tensor."""


@dataclass(frozen=True)
class History:
    """Tensors of shape (batch, tokens, ...) in order, and the edits that the KV cache went through between them.

    It is never changed: what happens next makes another one, and an earlier one stays what it was.
    """

    _events: tuple[torch.Tensor | pb.CacheEdit, ...] = ()

    def then(self, tensor: torch.Tensor) -> "History":
        """With new tokens at the end."""
        events = (*self._events, tensor)
        return History(events) if len(events) <= _COMPACT_AFTER else History(_compact(events))

    def edited(self, edits: Sequence[pb.CacheEdit]) -> "History":
        """As the cache is after `edits`."""
        return History((*self._events, *edits)) if self._events else self

    def followed_by(self, tensor: torch.Tensor) -> torch.Tensor:
        """All tokens as the cache holds them now, and after them those of `tensor`: (batch, tokens, ...)."""
        past = _replay(self._events)
        return tensor if past is None else torch.cat([past, tensor], 1)


def _compact(events: Sequence[torch.Tensor | pb.CacheEdit]) -> tuple[torch.Tensor, ...]:
    result = _replay(events)
    return () if result is None else (result,)


def _replay(events: Sequence[torch.Tensor | pb.CacheEdit]) -> torch.Tensor | None:
    result: torch.Tensor | None = None
    pending: list[torch.Tensor] = []
    for event in events:
        if isinstance(event, torch.Tensor):
            pending.append(event)
            continue
        past = _join(result, pending)
        result = None if past is None else read_edit(event).tensor(past)
        pending = []
    return _join(result, pending)


def _join(first: torch.Tensor | None, rest: list[torch.Tensor]) -> torch.Tensor | None:
    parts = rest if first is None else [first, *rest]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else None
