"""Sessions on a span inside the tests' own process, and steps of several that go through it together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.generation.joined.batched_pass import Joiner
from peer.generation.steps import Step, StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from peer.service.generation import read_step
from peer.span.span import Mode, Span
from peer.start.arena_trial import arena_for
from peer.start.joining_trial import find_joiner
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from tests.tools.lora import put_lora
from tests.tools.spans import states


@dataclass
class Talk:
    """A session, the first row of which has so many tokens of padding."""

    session: Session
    padding: int = 0


class Desk:
    """A span, and sessions on it whose steps are run as the scheduler would have them run."""

    def __init__(self, span: Span, compiled: Joiner | None = None):
        self.span = span
        self.store = AdapterStore(span, 10**8, 64, 10**8)
        self.runner = StepRunner(span, self.store, find_joiner(span), compiled)
        self._memory = CacheMemory(100_000, 256, 30.0, arena_for(span, 100_000))

    def put(self, targets: Sequence[str], rank: int, seed: int, **options: Any) -> StoredAdapter:
        return put_lora(self.store, self.span, targets, rank, seed, **options)

    def open(self, padding: int = 0) -> Talk:
        return Talk(Session(self._memory, SpanCache(self.span.model.config, self.span.blocks)), padding)

    def step(
        self,
        talk: Talk,
        hidden: torch.Tensor,
        *edits: pb.CacheEdit,
        keep_past: bool = False,
        bundle: StoredAdapter | None = None,
        **tensors: torch.Tensor,
    ) -> Step:
        rows, tokens = hidden.shape[:2]
        crop = sum(edit.crop for edit in edits)
        if talk.padding:
            mask = torch.ones(rows, talk.session.cache.seen - crop + tokens, dtype=torch.long)
            mask[0, : talk.padding] = 0
            tensors["attention_mask"] = mask
        body = pb.Step(number=talk.session.number + 1, edits=edits, keep_past=keep_past)
        message = Message(body, {"hidden_states": hidden, **tensors})
        return read_step(self.span, talk.session, message, body, Mode(self.span.blocks), bundle)

    def run(self, *steps: Step) -> list[Any]:
        assert len({self.runner.group(step) for step in steps}) == 1
        outcomes = self.runner.run(list(steps))
        for step, outcome in zip(steps, outcomes, strict=True):
            step.session.number += isinstance(outcome, torch.Tensor)
        return outcomes

    def each(self, *steps: Step) -> list[Any]:
        """The same one by one."""
        return [outcome for step in steps for outcome in self.run(step)]


def play(desk: Desk, run: Callable[..., list[Any]], keep_past: bool) -> Iterator[torch.Tensor]:
    """Four sessions: long, padded with two rows, late, and edited. All that they are answered, but for the padding."""
    long, padded, late, beams = desk.open(), desk.open(padding=3), desk.open(), desk.open()
    repeat = [pb.CacheEdit(repeat_interleave=3)]
    options: dict[str, Any] = {"keep_past": keep_past}
    outcome = run(
        desk.step(long, states(1, 11, 1), **options),
        desk.step(padded, states(2, 6, 2), **options),
        desk.step(beams, states(1, 5, 3), **options),
    )
    yield from (outcome[0], outcome[1][:, 3:], outcome[2])
    yield from run(
        desk.step(long, states(1, 1, 4), **options),
        desk.step(late, states(1, 10, 5), position_ids=torch.arange(3, 13)[None], **options),
        desk.step(padded, states(2, 3, 6), **options),
        desk.step(beams, states(3, 1, 7), *repeat, **options),
    )
    crop = [pb.CacheEdit(crop=2)] if keep_past else []
    for seed in (8, 9):
        reorder = pb.CacheEdit(reorder=pb.IndexList(index=[2, 0, 0]))
        yield from run(
            desk.step(beams, states(3, 2, seed), reorder, **options),
            desk.step(long, states(1, 3, 10 * seed), *crop, **options),
            desk.step(padded, states(2, 1, 11 * seed), **options),
            desk.step(late, states(1, 2, 12 * seed), *crop, **options),
        )
    select = [pb.CacheEdit(select=pb.IndexList(index=[1]))]
    padded.padding = 0
    yield from run(desk.step(late, states(1, 1, 13)), desk.step(padded, states(1, 1, 14), *select))
