"""Other peers in the place of one that fails, is about to leave or has become slow: they are told all that it saw."""

from collections.abc import Sequence

import torch

from client.generation.past import Past
from client.generation.stage import Stage, chunk_sizes, joined
from client.generation.step import Step
from client.requests.caller import Caller
from client.swarm.retries import Retries
from client.swarm.routes import Hop
from protocol.errors import PeerFull, SwarmError

_MOST_GIVEN_UP = 8
"""Idle sessions that one step may end: a peer may refuse it for other reasons than room, which that would not help."""


class Replacement:
    """Opens stages, and puts others in the place of those in `stages`. Counts the failures of one step."""

    def __init__(self, caller: Caller, past: Past, stages: list[Stage]):
        self._caller, self._past, self._stages = caller, past, stages
        self._retries = Retries(caller.swarm)
        self._given_up = 0

    async def open(self, start: int, end: int) -> list[Stage]:
        """New sessions on the peers of a route over blocks [start, end). Raises as `Retries.find_route`."""
        stages: list[Stage] = []

        async def open_stage(hop: Hop) -> None:
            stages.append(await Stage.open(self._caller, self._past, hop))

        retries = self._retries
        try:
            await retries.hop_by_hop(await retries.find_route(start, end, "decode"), "decode", open_stage)
        except BaseException:
            close_stages(stages)
            raise
        return stages

    async def run(
        self, index: int, step: Step, hidden: torch.Tensor, done: Sequence[torch.Tensor]
    ) -> tuple[int, torch.Tensor]:
        """Take a step through the stage number `index`, or through others in its place.

        `done`: what the stage has put out for the first tokens already. Returns the number of the next stage, and the
        output for all tokens. Raises as `Retries.find_route`.
        """
        start = sum(output.shape[1] for output in done)
        if start == step.tokens:
            return index + 1, joined(done)
        rest, hidden = step.part(start, step.tokens - start), hidden[:, start:]
        stage = self._stages[index]
        if stage.error is not None:
            self._failed(stage, stage.error)
        if stage.channel is None or await stage.should_move():
            index, output = await self._replace(index, rest, hidden)
        else:
            index, output = await self._run_or_replace(index, rest, hidden)
        return index, joined([*done, output])

    def _failed(self, stage: Stage, error: SwarmError) -> None:
        """Take note of a failure; where a peer lacks room, this client's idle sessions on it give way first."""
        sessions, peer = self._caller.swarm.sessions, stage.hop.peer
        if isinstance(error, PeerFull) and self._given_up < _MOST_GIVEN_UP and sessions.give_way(peer.peer_id):
            self._given_up += 1
        else:
            self._retries.failed(peer, error)

    async def _run_or_replace(self, index: int, step: Step, hidden: torch.Tensor) -> tuple[int, torch.Tensor]:
        stage, done = self._stages[index], list[torch.Tensor]()
        sizes = chunk_sizes([stage], hidden, self._caller.swarm.config.prefill_chunk_tokens)
        for part, chunk in zip(step.parts(sizes), hidden.split(sizes, 1), strict=True):
            try:
                done.append(await stage.run(part, chunk))
            except SwarmError as error:
                self._failed(stage, error)
                start = sum(output.shape[1] for output in done)
                rest = step.part(start, step.tokens - start)
                index, output = await self._replace(index, rest, hidden[:, start:])
                return index, joined([*done, output])
        return index + 1, joined(done)

    async def _replace(self, index: int, step: Step, hidden: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Put other peers in the place of a stage and give them all that it had seen, in one prefill.

        Returns the number of the next stage, and the output for the tokens of `step`.
        """
        failed = self._stages[index]
        failed.close()
        everything = failed.history.followed_by(hidden)
        whole = self._past.whole(step, everything)
        while True:
            stages = await self.open(failed.hop.start, failed.hop.end)
            flow = everything
            try:
                for stage in stages:
                    flow = await stage.replay(step, whole, flow)
            except SwarmError as error:
                close_stages(stages)
                self._failed(stage, error)
                continue
            except BaseException:
                close_stages(stages)
                raise
            self._stages[index : index + 1] = stages
            return index + len(stages), flow[:, -step.tokens :]


def close_stages(stages: Sequence[Stage]) -> None:
    """End the sessions on the peers."""
    for stage in stages:
        stage.close()
