"""New tokens for the KV caches of a generation, and chunks of them."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from client.requests.handover import Boundary
from client.requests.work import Work
from protocol import swarm_pb2 as pb


@dataclass(frozen=True)
class Step:
    """What is to be done with new tokens, whatever their hidden states are when they come to a stage."""

    work: Work
    edits: list[pb.CacheEdit]
    """Before the tokens."""
    keep_past: bool
    start: int
    """Tokens in the caches before these, a KV prefix included."""
    tokens: int
    whole: "Step | None" = None
    """The step that this is a part of; None: it is none."""

    @property
    def positions(self) -> torch.Tensor:
        """(batch or 1, tokens) of the whole step, also where the user gave none."""
        step = self.whole or self
        if step.work.positions is not None:
            return step.work.positions
        return torch.arange(step.start, step.start + step.tokens)[None]

    def parts(self, sizes: Sequence[int]) -> "list[Step]":
        """One after the other, of so many tokens each."""
        starts = itertools.accumulate(sizes[:-1], initial=0)
        return [self.part(start, size) for start, size in zip(starts, sizes, strict=True)]

    def part(self, start: int, tokens: int) -> "Step":
        """What is to be done with so many of the tokens from the one numbered `start` on."""
        if tokens == self.tokens:
            return self
        end, positions, mask = start + tokens, self.work.positions, self.work.mask
        work = replace(
            self.work,
            positions=positions[:, start:end] if positions is not None else None,
            mask=mask[:, : mask.shape[1] - self.tokens + end] if mask is not None else None,
        )
        edits = self.edits if not start else []
        return Step(work, edits, self.keep_past, self.start + start, tokens, self.whole or self)


@dataclass(frozen=True)
class Chunk:
    """A part of a step on one stage, when several are in flight."""

    step: Step
    like: torch.Tensor
    """What goes in, in shape and dtype only."""
    input: "asyncio.Future[torch.Tensor]"
    output: "asyncio.Future[torch.Tensor]"
    before: Boundary | None
    """That the input is pushed over; None: the request takes it along."""
    after: Boundary | None
