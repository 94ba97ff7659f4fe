"""A batched pass: one trunk pass for the steps of several sessions, and what a way to run one must offer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from peer.kv_cache.span_cache import SpanCache
from peer.span.span import Adapted, Inputs, Mode

T = TypeVar("T")


class BatchMember:
    """One session's tokens in a batched pass. A failure of this member only is noted in it; the others go on."""

    def __init__(self, inputs: Inputs, cache: SpanCache):
        self.inputs, self.cache = inputs, cache
        self.rows, self.tokens = inputs.hidden.shape[:2]
        self.size = self.rows * self.tokens
        """Tokens of all rows: the member's share of the row in which all members' tokens lie end to end."""
        self.error: Exception | None = None

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of `work`; `None` when that failed, or anything before it."""
        try:
            return None if self.error else work()
        except Exception as error:
            self.error = error
            return None


@dataclass(eq=False)
class BatchedPass:
    """Members that go through the trunk together."""

    members: Sequence[BatchMember]
    has_begun: bool = False
    """Whether any session's cache may have taken tokens."""

    @property
    def size(self) -> int:
        """Tokens of all members."""
        return sum(member.size for member in self.members)

    def row(self) -> torch.Tensor:
        """(1, all tokens, hidden size): the members' hidden states end to end."""
        hidden = [member.inputs.hidden for member in self.members]
        return torch.cat([states.reshape(1, -1, states.shape[2]) for states in hidden], 1)

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Each member's hidden states (rows, tokens, hidden size).

        They are copies: a session keeps its answer, and must not keep the others' with it.
        """
        each = row.split([member.size for member in self.members], 1)
        pairs = zip(each, self.members, strict=True)
        return [own.clone().reshape(member.inputs.hidden.shape) for own, member in pairs]


class Joiner(Protocol):
    """A way to run batched passes on a span."""

    def run(self, batch: BatchedPass, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """Each member's hidden states (rows, tokens, hidden size) after `mode.blocks`, on the CPU.

        The caches have taken the tokens. A member that failed alone has its `error` set, and its hidden states mean
        nothing.
        """
