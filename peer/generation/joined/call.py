"""What a joint call is: one trunk call for the steps of several sessions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from peer.kv_cache.span_cache import SpanCache
from peer.span.span import Adapted, Inputs, Mode

T = TypeVar("T")


class Part:
    """One session's tokens in a joint call. What fails for one part alone is noted in it; the others go on."""

    def __init__(self, inputs: Inputs, cache: SpanCache):
        self.inputs, self.cache = inputs, cache
        self.rows, self.tokens = inputs.hidden.shape[:2]
        self.size = self.rows * self.tokens
        """Tokens of all rows: what it takes of the row in which all parts' tokens lie end to end."""
        self.error: Exception | None = None

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of `work`; `None` when that failed, or anything before it."""
        try:
            return None if self.error else work()
        except Exception as error:
            self.error = error
            return None


@dataclass(eq=False)
class JointCall:
    """Parts that go through the trunk together."""

    parts: Sequence[Part]
    has_begun: bool = False
    """Whether any session's cache may have taken tokens."""

    @property
    def size(self) -> int:
        """Tokens of all parts."""
        return sum(part.size for part in self.parts)

    def row(self) -> torch.Tensor:
        """(1, all tokens, hidden size): the parts' hidden states end to end."""
        hidden = [part.inputs.hidden for part in self.parts]
        return torch.cat([states.reshape(1, -1, states.shape[2]) for states in hidden], 1)

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Each part's hidden states (rows, tokens, hidden size), copied: an answer is kept as long as its session."""
        each = row.split([part.size for part in self.parts], 1)
        return [own.clone().reshape(part.inputs.hidden.shape) for own, part in zip(each, self.parts, strict=True)]


class Joiner(Protocol):
    """A way to run joint calls on a span."""

    def run(self, call: JointCall, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """Each part's hidden states (rows, tokens, hidden size) after `mode.blocks`, on the CPU.

        The caches have taken the tokens. A part that failed alone says so, and its hidden states mean nothing.
        """
