"""A generation: KV caches on the peers of a route, and their replacement when a peer fails."""

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch

from client.generation.dynamic_rope import ReachDependence
from client.generation.history import History
from client.generation.stage import Stage
from client.generation.step import Part, Step
from client.requests.caller import as_received, recompute_forward
from client.requests.handover import (
    Border,
    borders,
    link,
    should_hand_over,
)
from client.requests.puts import call_with_adapter
from client.requests.verify import Answer
from client.requests.work import Prefix, Work, answered_hidden
from client.swarm.loop import LOOP, settle
from client.swarm.retries import Retries
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import NoRoute, PeerFailed, SwarmError

_LOOK_ROUND = 16
"""Steps between two looks for a faster peer."""
_SLOWER, _WORTH_IT = 2.0, 0.05
"""How many times as slow a peer must be, and by how many seconds a step, for a session to leave it."""


class Session:
    """The KV caches of one generation. Used from the user's thread; its work is done on the loop."""

    def __init__(self, swarm: Swarm, blocks: range, reach: ReachDependence):
        self._swarm, self._blocks, self._reach = swarm, blocks, reach
        self._stages: list[Stage] = []
        self._positions = History()
        self._reaches = History()
        """Of every token, how far the step reached that it came with; empty where that makes no difference."""
        self._gives_positions = False
        """The user has given positions for some step. Those of others are what peers take when they get none."""
        self._prefix: Prefix = {}
        weakref.finalize(self, LOOP.call, _close_stages, self._stages)

    def step(self, work: Work, hidden: torch.Tensor, edits: list[pb.CacheEdit], keep_past: bool) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after all blocks, for tokens that the cache then holds too."""
        return LOOP.run(self._step(work, hidden, edits, keep_past))

    def fork(self) -> "Session":
        """A copy of the caches as they are now."""
        return LOOP.run(self._fork())

    def close(self) -> None:
        """End the sessions on the peers."""
        LOOP.call(_close_stages, self._stages)

    async def _step(self, work: Work, hidden: torch.Tensor, edits: list[pb.CacheEdit], keep_past: bool) -> torch.Tensor:
        if work.prefix:
            self._prefix = work.prefix
        for stage in self._stages:
            stage.history.edit(edits)
        self._positions.edit(edits)
        self._reaches.edit(edits)
        before = [(stage.hop, stage.history.fork()) for stage in self._stages]
        positions = self._count_on(hidden) if work.positions is None else work.positions
        step = Step(replace(work, prefix=self._prefix), hidden, edits, keep_past, positions)
        self._gives_positions |= work.positions is not None
        try:
            output = await self._run_stages(step)
        except BaseException:
            # Some peers did the step and some did not: all are made again from what was before, if it goes on at all.
            _close_stages(self._stages)
            self._stages += [Stage(hop, None, history=history) for hop, history in before]
            raise
        self._positions.append(positions.expand(hidden.shape[0], -1))
        if self._reach:
            self._reaches.append(_reaches_of(step))
        return output

    def _count_on(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, tokens), where the cache ends."""
        prefix = next(iter(self._prefix.values()))[0].shape[2] if self._prefix else 0
        start = prefix + self._positions.tokens
        return torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]

    async def _run_stages(self, step: Step) -> torch.Tensor:
        retries = Retries(self._swarm)
        if not self._stages:
            self._stages += await self._open_stages(retries, self._blocks.start, self._blocks.stop)
        done = await self._run_chunks(step)
        flow, index = step.hidden, 0
        while index < len(self._stages):
            stage = self._stages[index]
            outputs = done.get(id(stage), [])
            start = sum(output.shape[1] for output in outputs)
            if start < flow.shape[1]:
                index, rest = await self._run_or_replace(retries, index, step.part(start, flow[:, start:]))
                outputs = [*outputs, rest]
            else:
                index += 1
            flow = _joined(outputs)
        return flow

    async def _run_chunks(self, step: Step) -> dict[int, list[torch.Tensor]]:
        """Take a step through the stages with several requests in flight, as far as that goes without a failure.

        A long prompt goes in chunks; and where peers hand their results to each other, all are asked at once. Returns
        by `id` of a stage what it put out.
        """
        sizes = self._chunk_sizes(step, self._stages)
        count = len(sizes)
        hands_over = await self._hands_over()
        if count == 1 and not hands_over:
            return {}
        chunks = step.hidden.split(sizes, 1)
        hops = [stage.hop for stage in self._stages]
        crossed = [borders(self._swarm, hops, "hidden_states") if hands_over else [] for _ in chunks]
        done: dict[int, list[torch.Tensor]] = {}
        inputs: list[asyncio.Future[torch.Tensor]] = _futures(count)
        for chunk, future in zip(chunks, inputs, strict=True):
            future.set_result(chunk)
        tasks = []
        for index, stage in enumerate(self._stages):
            around = [[None, *row, None][index : index + 2] if hands_over else [None, None] for row in crossed]
            outputs = _futures(count)
            done[id(stage)] = []
            parts = [
                Part(part, source, output, *pair)
                for part, source, output, pair in zip(step.parts(sizes), inputs, outputs, around, strict=True)
            ]
            tasks.append(asyncio.create_task(self._feed(stage, parts, done[id(stage)])))
            inputs = outputs
        await settle(tasks)
        return done

    def _chunk_sizes(self, step: Step, stages: Sequence[Stage]) -> list[int]:
        """Tokens in each of the requests in which a step goes to `stages`."""
        rows, tokens, width = step.hidden.shape
        if self._reach:
            return [tokens]
        channels = [stage.channel for stage in stages if stage.channel is not None]
        room = min((min(channel.remote_limit, channel.limits.max_payload) for channel in channels), default=2**62)
        # Half of it, because masks and prefixes go along; four bytes, because answers may be wider than what was sent.
        fit = room // 2 // (rows * width * max(step.hidden.itemsize, 4))
        count = -(-tokens // min(self._swarm.config.prefill_chunk_tokens, max(fit, 1)))
        return [tokens // count + (i < tokens % count) for i in range(count)]

    async def _hands_over(self) -> bool:
        """Whether the peers hand their results of the next step to each other."""
        if not should_hand_over(self._swarm, [stage.hop for stage in self._stages]):
            return False
        if any(stage.channel is None for stage in self._stages):
            return False
        return not any([await self._should_move(stage) for stage in self._stages])

    async def _feed(self, stage: Stage, parts: list[Part], done: list[torch.Tensor]) -> None:
        """One stage's chunks, in order. After a failure those that follow are cancelled, down to the last stage."""
        try:
            if stage.channel is None:
                return
            for part in parts:
                done.append(await self._run_part(stage, part))
                part.output.set_result(done[-1])
        except SwarmError as error:
            if stage.channel is not None:
                stage.channel.close()
            stage.channel, stage.error = None, error
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
        finally:
            for part in parts:
                part.output.cancel()

    async def _run_part(self, stage: Stage, part: Part) -> torch.Tensor:
        """A chunk's output. What another peer pushes is asked for before it is known here."""
        if part.before is None:
            hidden = await asyncio.shield(part.input)
            return await self._run_checked(stage, replace(part.step, hidden=hidden), part.after)
        running = asyncio.create_task(self._run(stage, part.step, part.before, part.after))
        try:
            hidden = await asyncio.shield(part.input)
            output = await running
        except BaseException:
            running.cancel()
            _close_stages([stage])
            stage.channel = None
            await asyncio.gather(running, return_exceptions=True)
            raise
        stage.history.append(hidden)
        return output

    async def _run_or_replace(self, retries: Retries, index: int, step: Step) -> tuple[int, torch.Tensor]:
        """Run a stage, or others in its place. Returns the index of the next stage, and the output."""
        stage = self._stages[index]
        if stage.error is not None:
            retries.failed(stage.hop.peer, stage.error)
        if stage.channel is None or await self._should_move(stage):
            return await self._replace(retries, index, step)
        done = list[torch.Tensor]()
        for part in step.parts(self._chunk_sizes(step, [stage])):
            try:
                done.append(await self._run_checked(stage, part))
            except SwarmError as error:
                retries.failed(stage.hop.peer, error)
                start = sum(output.shape[1] for output in done)
                index, rest = await self._replace(retries, index, step.part(start, step.hidden[:, start:]))
                return index, _joined([*done, rest])
        return index + 1, _joined(done)

    async def _run_checked(self, stage: Stage, step: Step, after: Border | None = None) -> torch.Tensor:
        output = await self._run(stage, step, None, after)
        if self._swarm.verifier.is_due(step.work) and (not self._reach or len(self._runs(step)) == 1):
            await self._verify(stage, step, output)
        stage.history.append(step.hidden)
        return output

    async def _run(
        self, stage: Stage, step: Step, before: Border | None = None, after: Border | None = None
    ) -> torch.Tensor:
        """A stage's output; its input comes by way of the border `before`, if there is one, or else in the request."""
        assert stage.channel
        hop, work, number = stage.hop, step.work, stage.number + 1
        body = pb.Step(context=work.context(hop), number=number, edits=step.edits, keep_past=step.keep_past)
        if before or after:
            body.hand_over.CopyFrom(link(before, after, copy=True))
        hidden = None if before else step.hidden
        message = Message(body, work.tensors(hop, hidden, with_prefix=number == 1), work.codecs.of_request)
        on_working = before.on_working if before else None
        with self._swarm.health.asking(hop.peer.peer_id) as asking:
            answer, seconds = await call_with_adapter(
                self._swarm.puts, stage.channel, message, work.bundle(hop), on_working
            )
        if asking.alone and not before and step.hidden.shape[:2] == (1, 1):  # comparable with what peers announce
            self._swarm.health.took(hop, 1, seconds)
        result = answer.body if isinstance(answer.body, pb.Result) else pb.Result()
        stage.number, stage.leaving = number, result.leaving
        self._swarm.health.succeed(hop.peer.peer_id)
        output = answered_hidden(answer, step.hidden, hop.peer.peer_id)
        if after:
            await after.passed(output, result.pushed)
        return output

    async def _verify(self, stage: Stage, step: Step, output: torch.Tensor) -> None:
        """Have others compute a step's output from everything that led to it. Raises `Distrusted`."""
        everything = stage.history.followed_by(step.hidden)
        codecs, (everything,) = as_received(self._swarm, step.work, stage.hop, everything)
        base = everything[:, -step.hidden.shape[1] :]
        answer = Answer(stage.hop, "step", {"hidden_states": output}, {"hidden_states": base}, codecs.back)
        whole = self._whole(step, everything)
        again = recompute_forward(self._swarm, whole, stage.hop, everything, tokens=step.hidden.shape[1])
        await self._swarm.verifier.check(answer, again)

    async def _should_move(self, stage: Stage) -> bool:
        """Whether other peers had better take over from one that is about to leave, or has become slow."""
        if not stage.leaving and (not stage.number or stage.number % _LOOK_ROUND):
            return False
        hop, health = stage.hop, self._swarm.health
        if stage.leaving:
            self._swarm.keep_away(hop.peer)
        try:
            route = await self._swarm.find_route(hop.start, hop.end, "decode")
        except NoRoute:  # until others come it goes on
            return False
        best = sum(health.decode_cost(other.peer, other.end - other.start) for other in route)
        return stage.leaving or health.decode_cost(hop.peer, hop.end - hop.start) > _SLOWER * best + _WORTH_IT

    async def _replace(self, retries: Retries, index: int, step: Step) -> tuple[int, torch.Tensor]:
        """Put other peers in the place of a stage and give them all that it had seen, in one prefill.

        Returns the index of the next stage to run and the hidden states that go into it.
        """
        failed = self._stages[index]
        _close_stages([failed])
        everything = failed.history.followed_by(step.hidden)
        whole = Step(self._whole(step, everything), everything, [], step.keep_past, step.positions)
        while True:
            stages = await self._open_stages(retries, failed.hop.start, failed.hop.end)
            flow = everything
            try:
                for stage in stages:
                    flow = await self._replay(stage, step, replace(whole, hidden=flow))
            except SwarmError as error:
                _close_stages(stages)
                retries.failed(stage.hop.peer, error)
                continue
            except BaseException:
                _close_stages(stages)
                raise
            self._stages[index : index + 1] = stages
            return index + len(stages), flow[:, -step.hidden.shape[1] :]

    async def _replay(self, stage: Stage, step: Step, whole: Step) -> torch.Tensor:
        """A new stage's output for all tokens up to the end of `step`, which `whole` has."""
        sizes = self._runs(step) if self._reach else self._chunk_sizes(whole, [stage])
        outputs = list[torch.Tensor]()
        for part in whole.parts(sizes):
            outputs.append(await self._run(stage, part))
            stage.history.append(part.hidden)
        return _joined(outputs)

    def _runs(self, step: Step) -> list[int]:
        """The tokens up to the end of `step`, in as many calls as it takes to make their keys as they were made."""
        return self._reach.runs(self._reaches.followed_by(_reaches_of(step))[0])

    def _whole(self, step: Step, everything: torch.Tensor) -> Work:
        """A step's work for all tokens so far instead of the new ones."""
        positions = None
        if self._gives_positions:
            positions = self._positions.followed_by(step.positions.expand(everything.shape[0], -1))
            positions = positions[:, : everything.shape[1]]
        prefix = {b: _expanded(pair, everything.shape[0]) for b, pair in step.work.prefix.items()}
        return replace(step.work, positions=positions, prefix=prefix)

    async def _open_stages(self, retries: Retries, start: int, end: int) -> list[Stage]:
        """Sessions on the peers of a route over blocks [start, end)."""
        stages: list[Stage] = []

        async def open_stage(hop: Hop) -> None:
            stages.append(Stage(hop, await self._open(hop)))

        try:
            await retries.hop_by_hop(await retries.find_route(start, end, "decode"), "decode", open_stage)
        except BaseException:
            _close_stages(stages)
            raise
        return stages

    async def _open(self, hop: Hop, fork_of: bytes = b"") -> Channel:
        channel = await self._swarm.connections.open(hop.peer.peer_id)
        try:
            await channel.call(Message(pb.OpenSession(start=hop.start, end=hop.end, fork_of=fork_of)))
        except BaseException:
            channel.close()
            raise
        return channel

    async def _fork(self) -> "Session":
        twin = Session(self._swarm, self._blocks, self._reach)
        twin._positions, twin._reaches = self._positions.fork(), self._reaches.fork()
        twin._prefix, twin._gives_positions = self._prefix, self._gives_positions
        for stage in self._stages:
            channel = await self._copy(stage)
            twin._stages.append(Stage(stage.hop, channel, stage.number, stage.history.fork()))
        return twin

    async def _copy(self, stage: Stage) -> Channel | None:
        """A copy of a stage's session; `None` when its peer cannot make one: the first step will, elsewhere."""
        if stage.channel is None:
            return None
        try:
            answer = await stage.channel.call(Message(pb.ForkSession()))
            if not isinstance(answer.body, pb.Result) or not answer.body.token:
                raise PeerFailed(f"Peer {stage.hop.peer.peer_id} did not fork a session.")
            return await self._open(stage.hop, answer.body.token)
        except SwarmError as error:
            self._swarm.blame(stage.hop.peer, error)
            return None


def _joined(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), 1)


def _reaches_of(step: Step) -> torch.Tensor:
    """(batch, tokens)."""
    return (step.positions.max() + 1).expand(step.hidden.shape[:2])


def _futures(count: int) -> list["asyncio.Future[torch.Tensor]"]:
    loop = asyncio.get_running_loop()
    return [loop.create_future() for _ in range(count)]


def _expanded(pair: tuple[torch.Tensor, torch.Tensor], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prefix (the same in every row) for the batch as beam search has widened it."""
    key, value = pair
    return (
        (key, value)
        if key.shape[0] == batch
        else (key[:1].expand(batch, -1, -1, -1), value[:1].expand(batch, -1, -1, -1))
    )


def _close_stages(stages: list[Stage]) -> None:
    for stage in stages:
        if stage.channel is not None:
            stage.channel.close()
    stages.clear()
