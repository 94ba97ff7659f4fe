"""A generation: KV caches on the peers of a route, and their replacement when a peer fails."""

import time
import weakref
from dataclasses import dataclass, field, replace

import torch

from client.history import History
from client.hops import recompute_forward
from client.loop import LOOP
from client.retries import Retries
from client.routing import Hop
from client.swarm import Swarm
from client.verify import Answer
from client.work import Prefix, Work, answered_hidden, call_with_adapter
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import NoRoute, PeerFailed, PeerUnreachable, SwarmError

_LOOK_ROUND = 16
"""Steps between two looks for a faster peer."""
_SLOWER, _WORTH_IT = 2.0, 0.05
"""How many times as slow a peer must be, and by how many seconds a step, for a session to leave it."""


@dataclass
class _Stage:
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


class Session:
    """The KV caches of one generation. Used from the user's thread; its work is done on the loop."""

    def __init__(self, swarm: Swarm, blocks: range):
        self._swarm, self._blocks = swarm, blocks
        self._stages: list[_Stage] = []
        self._positions = History()
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
        retries = Retries(self._swarm)
        if work.prefix:
            self._prefix = work.prefix
        work = replace(work, prefix=self._prefix)
        for stage in self._stages:
            stage.history.edit(edits)
        self._positions.edit(edits)
        if not self._stages:
            self._stages += await self._open_stages(retries, self._blocks.start, self._blocks.stop)
        index = 0
        while index < len(self._stages):
            stage = self._stages[index]
            if await self._should_move(stage):
                index, hidden = await self._replace(retries, index, work, hidden, keep_past)
                continue
            try:
                output = await self._run(stage, work, hidden, edits, keep_past)
                if self._swarm.verifier.is_due(work):
                    await self._verify(stage, work, hidden, output)
            except SwarmError as error:
                retries.failed(stage.hop.peer, error)
                index, hidden = await self._replace(retries, index, work, hidden, keep_past)
                continue
            stage.history.append(hidden)
            hidden, index = output, index + 1
        if work.positions is not None:
            self._positions.append(work.positions.expand(hidden.shape[0], -1))
        return hidden

    async def _run(
        self, stage: _Stage, work: Work, hidden: torch.Tensor, edits: list[pb.CacheEdit], keep_past: bool
    ) -> torch.Tensor:
        if stage.channel is None:
            raise PeerUnreachable(f"Peer {stage.hop.peer.peer_id} could not copy a session.")
        number = stage.number + 1
        body = pb.Step(context=work.context(stage.hop), number=number, edits=edits, keep_past=keep_past)
        message = Message(body, work.tensors(stage.hop, hidden, with_prefix=number == 1))
        begin = time.perf_counter()
        answer = await call_with_adapter(self._swarm.puts, stage.channel, message, work.bundle(stage.hop))
        if hidden.shape[:2] == (1, 1):  # comparable with what peers announce
            self._swarm.health.took(stage.hop, 1, time.perf_counter() - begin)
        stage.number = number
        stage.leaving = isinstance(answer.body, pb.Result) and answer.body.leaving
        self._swarm.health.succeed(stage.hop.peer.peer_id)
        return answered_hidden(answer, hidden, stage.hop.peer.peer_id)

    async def _verify(self, stage: _Stage, work: Work, hidden: torch.Tensor, output: torch.Tensor) -> None:
        """Have others compute a step's output from everything that led to it. Raises `Distrusted`."""
        past = stage.history.replay()
        everything = hidden if past is None else torch.cat([past, hidden], 1)
        answer = Answer(stage.hop, "step", {"hidden_states": output}, {"hidden_states": hidden})
        again = recompute_forward(
            self._swarm, self._whole(work, everything), stage.hop, everything, tokens=hidden.shape[1]
        )
        await self._swarm.verifier.check(answer, again)

    async def _should_move(self, stage: _Stage) -> bool:
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

    async def _replace(
        self, retries: Retries, index: int, work: Work, hidden: torch.Tensor, keep_past: bool
    ) -> tuple[int, torch.Tensor]:
        """Put other peers in the place of a stage and give them all that it had seen, in one prefill.

        Returns the index of the next stage to run and the hidden states that go into it.
        """
        failed = self._stages[index]
        _close_stages([failed])
        past = failed.history.replay()
        everything = hidden if past is None else torch.cat([past, hidden], 1)
        replay = self._whole(work, everything)
        while True:
            stages = await self._open_stages(retries, failed.hop.start, failed.hop.end)
            flow = everything
            try:
                for stage in stages:
                    output = await self._run(stage, replay, flow, [], keep_past)
                    stage.history.append(flow)
                    flow = output
            except SwarmError as error:
                _close_stages(stages)
                retries.failed(stage.hop.peer, error)
                continue
            self._stages[index : index + 1] = stages
            return index + len(stages), flow[:, -hidden.shape[1] :]

    def _whole(self, work: Work, everything: torch.Tensor) -> Work:
        """`work` for all tokens instead of the new ones."""
        positions, past = work.positions, self._positions.replay()
        if positions is not None and past is not None:
            positions = torch.cat([past, positions.expand(past.shape[0], -1)], 1)
        prefix = {b: _expanded(pair, everything.shape[0]) for b, pair in work.prefix.items()}
        return replace(work, positions=positions, prefix=prefix)

    async def _open_stages(self, retries: Retries, start: int, end: int) -> list[_Stage]:
        """Sessions on the peers of a route over blocks [start, end)."""
        stages: list[_Stage] = []

        async def open_stage(hop: Hop) -> None:
            stages.append(_Stage(hop, await self._open(hop)))

        try:
            await retries.hop_by_hop(start, end, "decode", open_stage)
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
        twin = Session(self._swarm, self._blocks)
        twin._positions, twin._prefix = self._positions.fork(), self._prefix
        for stage in self._stages:
            channel = await self._copy(stage)
            twin._stages.append(_Stage(stage.hop, channel, stage.number, stage.history.fork()))
        return twin

    async def _copy(self, stage: _Stage) -> Channel | None:
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


def _expanded(pair: tuple[torch.Tensor, torch.Tensor], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prefix (the same in every row) for the batch as beam search has widened it."""
    key, value = pair
    return (
        (key, value)
        if key.shape[0] == batch
        else (key[:1].expand(batch, -1, -1, -1), value[:1].expand(batch, -1, -1, -1))
    )


def _close_stages(stages: list[_Stage]) -> None:
    for stage in stages:
        if stage.channel is not None:
            stage.channel.close()
    stages.clear()
