"""A generation: KV caches on the peers of a route, and the way of a step through them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from client.generation.dynamic_rope import DynamicRope
from client.generation.past import Past
from client.generation.pipeline import run_in_flight
from client.generation.replacement import Replacement, close_stages
from client.generation.stage import Stage, chunk_sizes
from client.generation.step import Step
from client.requests.caller import Caller
from client.requests.handover import should_hand_over
from client.requests.work import Work
from protocol import swarm_pb2 as pb
from protocol.errors import SwarmError


class InferenceSession:
    """The KV caches of one generation. Used from the user's thread; its work is done on the loop, by `run_*`."""

    def __init__(self, caller: Caller, blocks: range, rope: DynamicRope):
        self._caller, self.blocks = caller, blocks
        self._past = Past(rope)
        self._stages: list[Stage] = []
        self._loop = caller.swarm.loop
        weakref.finalize(self, self._loop.call, close_stages, self._stages)

    def step(
        self, work: Work, hidden: torch.Tensor, edits: list[pb.CacheEdit], keep_past: bool, start: int
    ) -> torch.Tensor:
        """As `run_step`, from the user's thread."""
        return self._loop.run(self.run_step(work, hidden, edits, keep_past, start))

    def fork(self) -> "InferenceSession":
        """As `run_fork`, from the user's thread."""
        return self._loop.run(self.run_fork())

    def close(self) -> None:
        """End the sessions on the peers."""
        self._loop.call(close_stages, self._stages)

    async def run_step(
        self, work: Work, hidden: torch.Tensor, edits: list[pb.CacheEdit], keep_past: bool, start: int
    ) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after all blocks, for tokens that the cache then holds too.

        `edits`: what the cache goes through before them. `start`: the tokens that it holds then, a KV prefix included.
        Raises `NoRoute`, and what the last peer that was tried refused the step with; the caches are then as after
        `edits`.
        """
        step = self._past.begin(work, edits, keep_past, start, hidden)
        if edits:
            for stage in self._stages:
                stage.history = stage.history.edited(edits)
        before = [(stage.hop, stage.history) for stage in self._stages]
        try:
            with self._in_use():
                output = await self._run(step, hidden)
        except BaseException:
            # Some peers did the step and some did not: all are made again from what was before, if it goes on at all.
            close_stages(self._stages)
            self._stages[:] = [Stage(self._caller, self._past, hop, history=history) for hop, history in before]
            raise
        if self._past.is_noted:
            self._past.note(step, len(hidden))
        return output

    async def run_fork(self) -> "InferenceSession":
        """A copy of the caches as they are now, while no step is under way."""
        twin = InferenceSession(self._caller, self.blocks, self._past.rope)
        twin._past = self._past.fork()
        with self._in_use(), twin._in_use():
            for stage in self._stages:
                twin._stages.append(await stage.fork(twin._past))
        return twin

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Within the block the caches do not give way to others."""
        for stage in self._stages:
            stage.is_idle = False
        try:
            yield
        finally:
            for stage in self._stages:
                stage.rest()

    async def _run(self, step: Step, hidden: torch.Tensor) -> torch.Tensor:
        """A step through all stages: straight on as long as nothing comes up."""
        stages, replacement = self._stages, None
        if not stages:
            replacement = Replacement(self._caller, self._past, stages)
            stages += await replacement.open(self.blocks.start, self.blocks.stop)
        done = await self._in_flight(step, hidden) if self._may_be_in_flight(step) else {}
        index = 0
        while index < len(stages):
            stage = stages[index]
            if stage.is_steady and stage not in done:
                try:
                    hidden = await stage.run(step, hidden)
                except SwarmError as error:
                    stage.close()
                    stage.error = error
                else:
                    index += 1
                    continue
            replacement = replacement or Replacement(self._caller, self._past, stages)
            index, hidden = await replacement.run(index, step, hidden, done.get(stage, ()))
        return hidden

    def _may_be_in_flight(self, step: Step) -> bool:
        """Whether several requests might be at once: most steps are of one token, which goes from peer to peer."""
        return step.tokens > 1 or should_hand_over(self._caller.swarm, [stage.hop for stage in self._stages])

    async def _in_flight(self, step: Step, hidden: torch.Tensor) -> dict[Stage, list[torch.Tensor]]:
        swarm, stages = self._caller.swarm, self._stages
        sizes = chunk_sizes(stages, hidden, swarm.config.prefill_chunk_tokens)
        hands_over = should_hand_over(swarm, [stage.hop for stage in stages]) and await self._all_stay()
        if len(sizes) == 1 and not hands_over:
            return {}
        return await run_in_flight(swarm, stages, step, hidden, sizes, hands_over)

    async def _all_stay(self) -> bool:
        """Whether every stage has a session, and none had better be replaced."""
        if any(stage.channel is None for stage in self._stages):
            return False
        return not any([await stage.should_move() for stage in self._stages])
