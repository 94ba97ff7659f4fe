"""What a generation's session is made of: a stage per hop, and the parts of a step that go through it."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from client.handover import Border
from client.history import History
from client.routing import Hop
from client.work import Work
from protocol import swarm_pb2 as pb
from protocol.channel import Channel
from protocol.errors import SwarmError


@dataclass
class Stage:
    """One hop's session on its peer."""

    hop: Hop
    channel: Channel | None
    """None: there is no such session, it is to be made from the history."""
    number: int = 0
    """Of the last step done."""
    history: History = field(default_factory=History)
    """Hidden states that went in."""
    leaving: bool = False
    """Its peer has said that it is about to leave."""
    error: SwarmError | None = None
    """With which its peer failed, if that has not been taken note of yet."""


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
