"""A step with several requests in flight: a long prompt in chunks, peers that hand their results to each other."""

import asyncio
from collections.abc import Sequence

import torch

from client.generation.stage import Stage
from client.generation.step import Chunk, Step
from client.requests.handover import Boundary, boundaries
from client.swarm.loop import settle
from client.swarm.swarm import Swarm
from protocol.errors import SwarmError


async def run_in_flight(
    swarm: Swarm, stages: Sequence[Stage], step: Step, hidden: torch.Tensor, sizes: Sequence[int], hands_over: bool
) -> dict[Stage, list[torch.Tensor]]:
    """Take a step through the stages in chunks of `sizes` tokens, as far as that goes without a failure.

    Returns what each stage put out, chunk by chunk; fewer chunks than there are where it or one before it failed.
    `hands_over`: whether the peers hand their results to each other.
    """
    hops = [stage.hop for stage in stages]
    none: list[Boundary | None] = [None] * (len(stages) + 1)
    edges = [boundaries(swarm, hops, "hidden_states") if hands_over else none for _ in sizes]
    parts, like = step.parts(sizes), hidden.split(sizes, 1)
    inputs = _futures(len(sizes))
    for chunk, future in zip(like, inputs, strict=True):
        future.set_result(chunk)
    lanes = []
    for index, stage in enumerate(stages):
        outputs = _futures(len(sizes))
        around = [edge[index : index + 2] for edge in edges]
        chunks = [Chunk(*each, *pair) for *each, pair in zip(parts, like, inputs, outputs, around, strict=True)]
        lanes.append(_Lane(stage, chunks))
        inputs = outputs
    await settle([asyncio.create_task(lane.run()) for lane in lanes])
    return {lane.stage: lane.done for lane in lanes}


class _Lane:
    """The chunks of one stage, one after the other."""

    def __init__(self, stage: Stage, chunks: Sequence[Chunk]):
        self.stage, self._chunks = stage, chunks
        self.done = list[torch.Tensor]()

    async def run(self) -> None:
        """Does as many chunks as possible. After a failure those that follow are cancelled, down to the last stage."""
        try:
            if self.stage.channel is None:
                return
            for chunk in self._chunks:
                self.done.append(await self._run_chunk(chunk))
                chunk.output.set_result(self.done[-1])
        except SwarmError as error:
            self.stage.close()
            self.stage.error = error
        except asyncio.CancelledError:
            # A stage before this one has failed and cancelled our input: end quietly. Our own cancellation goes on.
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
        finally:
            for chunk in self._chunks:
                chunk.output.cancel()

    async def _run_chunk(self, chunk: Chunk) -> torch.Tensor:
        """A chunk's output. What another peer pushes is asked for before it is known here."""
        stage = self.stage
        if chunk.before is None:
            return await stage.run(chunk.step, await asyncio.shield(chunk.input), chunk.after)
        running = asyncio.create_task(stage.ask(chunk.step, chunk.like, chunk.before, chunk.after))
        try:
            hidden = await asyncio.shield(chunk.input)
            output = await running
        except BaseException:
            running.cancel()
            stage.close()
            await asyncio.gather(running, return_exceptions=True)
            raise
        stage.history = stage.history.then(hidden)
        return output


def _futures(count: int) -> list["asyncio.Future[torch.Tensor]"]:
    loop = asyncio.get_running_loop()
    return [loop.create_future() for _ in range(count)]
