"""What was sent into a span during a generation, so that its KV cache can be made again elsewhere."""

import torch

from protocol import swarm_pb2 as pb
from protocol.cache_edits import read_edit

_COMPACT_AFTER = 64


class History:
    """Tensors of shape (batch, tokens, ...) in order, under the edits that the KV cache went through."""

    def __init__(self) -> None:
        self._events: list[torch.Tensor | pb.CacheEdit] = []
        self.tokens = 0

    def append(self, tensor: torch.Tensor) -> None:
        """New tokens."""
        self._events.append(tensor)
        self.tokens += tensor.shape[1]
        if len(self._events) > _COMPACT_AFTER:
            self.replay()

    def edit(self, edits: list[pb.CacheEdit]) -> None:
        """What the cache goes through before the next tokens."""
        self._events.extend(edits)
        self.tokens = max(0, self.tokens - sum(edit.crop for edit in edits))

    def replay(self) -> torch.Tensor | None:
        """All tokens as the cache holds them now: (batch, tokens, ...); `None` when there are none."""
        result: torch.Tensor | None = None
        pending: list[torch.Tensor] = []
        for event in self._events:
            if isinstance(event, torch.Tensor):
                pending.append(event)
                continue
            past = _joined(result, pending)
            result = None if past is None else read_edit(event).tensor(past)
            pending = []
        result = _joined(result, pending)
        self._events = [] if result is None else [result]
        return result

    def followed_by(self, tensor: torch.Tensor) -> torch.Tensor:
        """All tokens, and after them those of `tensor`."""
        past = self.replay()
        return tensor if past is None else torch.cat([past, tensor], 1)

    def fork(self) -> "History":
        """A copy that goes its own way."""
        twin = History()
        twin._events, twin.tokens = list(self._events), self.tokens
        return twin


def _joined(first: torch.Tensor | None, rest: list[torch.Tensor]) -> torch.Tensor | None:
    parts = rest if first is None else [first, *rest]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else None
