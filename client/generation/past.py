"""What all stages of a generation share: positions, KV prefix, and how far each pass went where that matters."""

from dataclasses import replace

import torch

from client.generation.dynamic_rope import DynamicRope
from client.generation.history import History
from client.generation.step import Step
from client.requests.work import Work
from protocol import swarm_pb2 as pb
from protocol.tensors import KvPrefix


class Past:
    """What new peers have to be told of the steps so far, beside the hidden states that went in."""

    def __init__(self, rope: DynamicRope):
        self.rope = rope
        self.is_noted = bool(rope)
        """Whether what a step was has to be noted when it has been done."""
        self._prefix: KvPrefix = {}
        self._positions: History | None = None
        """Of all tokens, (batch, tokens); None until the user gives some: peers take the same ones when given none."""
        self._ends = History()
        """Of all tokens, (batch, tokens): see `DynamicRope.runs`. Kept where there is such a RoPE only."""

    def begin(self, work: Work, edits: list[pb.CacheEdit], keep_past: bool, start: int, hidden: torch.Tensor) -> Step:
        """The next step, as it is to be done: `edits`, and then `hidden` behind the `start` tokens that are left.

        A KV prefix comes with the first step and goes for all.
        """
        if work.prefix:
            self._prefix = work.prefix
        elif self._prefix:
            work = replace(work, prefix=self._prefix)
        if edits:
            self._positions = self._positions.edited(edits) if self._positions is not None else None
            self._ends = self._ends.edited(edits)
        if work.positions is not None and self._positions is None:
            own = torch.arange(self._prefix_length, start)
            self._positions, self.is_noted = History().then(own.expand(len(hidden), -1)), True
        return Step(work, edits, keep_past, start, hidden.shape[1])

    def note(self, step: Step, rows: int) -> None:
        """A step has been done by all stages."""
        if self._positions is not None:
            self._positions = self._positions.then(step.positions.expand(rows, -1))
        if self.rope:
            self._ends = self._ends.then(_ends_of(step, rows))

    def whole(self, step: Step, everything: torch.Tensor) -> Step:
        """All steps so far and then `step` as one; `everything` are the hidden states of all tokens."""
        rows, tokens = everything.shape[:2]
        positions = None
        if self._positions is not None:
            positions = self._positions.followed_by(step.positions.expand(rows, -1))[:, :tokens]
        prefix = {block: _expanded(pair, rows) for block, pair in step.work.prefix.items()}
        work = replace(step.work, positions=positions, prefix=prefix)
        return Step(work, [], step.keep_past, self._prefix_length, tokens)

    def runs(self, step: Step, rows: int) -> list[int]:
        """In passes of how many tokens all tokens up to the end of `step` come out with the keys that they had."""
        return self.rope.runs(self._ends.followed_by(_ends_of(step, rows))[0])

    def fork(self) -> "Past":
        """A copy that goes its own way."""
        twin = Past(self.rope)
        twin.is_noted = self.is_noted
        twin._prefix, twin._positions, twin._ends = self._prefix, self._positions, self._ends
        return twin

    @property
    def _prefix_length(self) -> int:
        return next(iter(self._prefix.values()))[0].shape[2] if self._prefix else 0


def _ends_of(step: Step, rows: int) -> torch.Tensor:
    return (step.positions.max() + 1).expand(rows, step.tokens)


def _expanded(pair: tuple[torch.Tensor, torch.Tensor], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prefix (the same in every row) for the rows as beam search has multiplied them."""
    key, value = pair
    if key.shape[0] == rows:
        return key, value
    return key[:1].expand(rows, -1, -1, -1), value[:1].expand(rows, -1, -1, -1)
