"""TODO."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from client.requests.handover import Border
from client.requests.work import Work
from protocol import swarm_pb2 as pb


@dataclass(frozen=True)
class Step:
    """New tokens for the caches, or a part of them."""

    work: Work
    hidden: torch.Tensor
    edits: list[pb.CacheEdit]
    """Before the tokens."""
    keep_past: bool
    positions: torch.Tensor
    """(batch or 1, tokens) of the whole step that this is a part of, also where the user gave none."""

    def parts(self, sizes: Sequence[int]) -> "list[Step]":
        """One after the other, of so many tokens each."""
        if len(sizes) == 1:
            return [self]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        return [self.part(start, part) for start, part in zip(starts, self.hidden.split(sizes, 1), strict=True)]

    def part(self, start: int, hidden: torch.Tensor) -> "Step":
        """What is to be done for `hidden`, which stands for the tokens from `start` on, as a stage is given them."""
        end, positions, mask = start + hidden.shape[1], self.work.positions, self.work.mask
        work = replace(
            self.work,
            positions=positions[:, start:end] if positions is not None else None,
            mask=mask[:, : mask.shape[1] - self.hidden.shape[1] + end] if mask is not None else None,
        )
        return Step(work, hidden, self.edits if not start else [], self.keep_past, self.positions)


@dataclass(frozen=True)
class Part:
    """A chunk of a step on one stage."""

    step: Step
    """`hidden` is as what goes in in shape and dtype only."""
    input: "asyncio.Future[torch.Tensor]"
    output: "asyncio.Future[torch.Tensor]"
    before: Border | None
    """That the input is pushed over; None: the request takes it along."""
    after: Border | None
