"""One hop's part of a generation: a session on its peer, and what it takes to make that session again elsewhere."""

from collections.abc import Sequence

import torch

from client.generation.history import History
from client.generation.past import Past
from client.generation.step import Step
from client.requests.caller import Caller
from client.requests.handover import Boundary, link
from client.requests.recompute import ForwardAgain
from client.requests.verify import Answer
from client.requests.work import answered_hidden, result_of
from client.swarm.routes import Hop
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import NoRoute, PeerFailed, PeerFull, SwarmError

_LOOK_ROUND = 16
"""Steps between two looks for a faster peer."""
_SLOWER, _WORTH_IT = 2.0, 0.05
"""How many times as slow a peer must be, and by how many seconds a step, for a session to leave it."""


class Stage:
    """A hop's session on its peer. `channel` None: there is no such session, it is to be made from the history."""

    def __init__(
        self, caller: Caller, past: Past, hop: Hop, channel: Channel | None = None, history: History | None = None
    ):
        self.past = past
        self._caller = caller
        self.hop, self.channel = hop, channel
        self.history = history or History()
        """Of the hidden states that went in."""
        self.number = 0
        """Of the last step done."""
        self.leaving = False
        """Its peer has said that it is about to leave."""
        self.error: SwarmError | None = None
        """With which its peer failed, if that has not been taken note of yet."""
        self.is_idle = False
        """Whether its session may be closed to make room for others."""

    @classmethod
    async def open(cls, caller: Caller, past: Past, hop: Hop) -> "Stage":
        """A new session on a hop's peer. Raises `SwarmError`."""
        stage = cls(caller, past, hop)
        await stage._open_session(b"")
        return stage

    @property
    def is_steady(self) -> bool:
        """Whether the next step can go to its peer without a look at others."""
        looks_round = self.number > 0 and self.number % _LOOK_ROUND == 0
        return self.channel is not None and not self.leaving and not looks_round

    async def should_move(self) -> bool:
        """Whether other peers had better take over: this one is about to leave, or has become slow."""
        if self.is_steady:
            return False
        hop, swarm = self.hop, self._caller.swarm
        if self.leaving:
            swarm.keep_away(hop.peer)
        try:
            route = await swarm.find_route(hop.start, hop.end, "decode")
        except NoRoute:  # until others come it goes on
            return False
        best = sum(swarm.health.decode_cost(other.peer, other.end - other.start) for other in route)
        return self.leaving or swarm.health.decode_cost(hop.peer, hop.end - hop.start) > _SLOWER * best + _WORTH_IT

    async def run(self, step: Step, hidden: torch.Tensor, after: Boundary | None = None) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after the hop, for a step's tokens; by chance verified.

        The peer hands them on over `after` too, if there is such a boundary. Raises `SwarmError`.
        """
        output = await self.ask(step, hidden, None, after)
        verifier = self._caller.verifier
        if verifier.share and verifier.is_due(step.work) and self._can_be_verified(step, hidden):
            await self._verify(step, hidden, output)
        self.history = self.history.then(hidden)
        return output

    async def ask(
        self, step: Step, hidden: torch.Tensor, before: Boundary | None = None, after: Boundary | None = None
    ) -> torch.Tensor:
        """As `run`, unverified, and not in the history. With `before`, over which it is pushed, `hidden` is a shape."""
        assert self.channel is not None
        hop, work, number = self.hop, step.work, self.number + 1
        bundle = work.bundle(hop) if work.adapters else None
        body = pb.Step(context=work.context(hop, bundle), number=number, edits=step.edits, keep_past=step.keep_past)
        if before or after:
            body.hand_over.CopyFrom(link(before, after, copy=True))
        tensors = work.tensors(hop, None if before else hidden, with_prefix=number == 1)
        message = Message(body, tensors, work.codecs.of_request)
        on_working = before.on_working if before else None
        peer_id, health = hop.peer.peer_id, self._caller.swarm.health
        with health.asking(peer_id) as asking:
            answer = await self._caller.call(self.channel, message, bundle, asking, on_working)
        health.succeed(peer_id)
        if (seconds := asking.seconds) is not None and not before and hidden.shape[:2] == (1, 1):
            health.took(hop, 1, seconds)  # comparable with what peers announce
        result = result_of(answer)
        self.number, self.leaving = number, result.leaving
        output = answered_hidden(answer, hidden, peer_id)
        if after:
            await after.passed(output, result.pushed)
        return output

    async def replay(self, step: Step, whole: Step, hidden: torch.Tensor) -> torch.Tensor:
        """A new stage's output for all tokens up to the end of `step`; `whole` is all of that as one step."""
        most = self._caller.swarm.config.prefill_chunk_tokens
        sizes = self.past.runs(step, len(hidden)) if self.past.rope else chunk_sizes([self], hidden, most)
        outputs = list[torch.Tensor]()
        for part, chunk in zip(whole.parts(sizes), hidden.split(sizes, 1), strict=True):
            outputs.append(await self.ask(part, chunk))
            self.history = self.history.then(chunk)
        return joined(outputs)

    async def fork(self, past: Past) -> "Stage":
        """A copy; without a session when the peer cannot copy it: then the first step makes one, elsewhere."""
        twin = Stage(self._caller, past, self.hop, None, self.history)
        twin.number = self.number
        if self.channel is not None:
            try:
                answer = await self.channel.call(Message(pb.ForkSession()))
                if not isinstance(answer.body, pb.Result) or not answer.body.token:
                    raise PeerFailed(f"Peer {self.hop.peer.peer_id} did not fork a session.")
                await twin._open_session(answer.body.token)
            except SwarmError as error:
                self._caller.swarm.blame(self.hop.peer, error)
        return twin

    def close(self) -> None:
        """End the session."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
            self._caller.swarm.sessions.remove(self.hop.peer.peer_id, self)

    def rest(self) -> None:
        """Nothing is being done with it until the next step: its session may be closed to make room for others."""
        self.is_idle = True
        if self.channel is not None:
            self._caller.swarm.sessions.add(self.hop.peer.peer_id, self)

    async def _open_session(self, fork_of: bytes) -> None:
        """Open a session; this client's idle ones on the peer give way if it takes that. Raises `SwarmError`."""
        swarm, peer_id = self._caller.swarm, self.hop.peer.peer_id
        swarm.sessions.make_room(peer_id)
        while True:
            channel = await swarm.connections.open(peer_id)
            try:
                await channel.call(Message(pb.OpenSession(start=self.hop.start, end=self.hop.end, fork_of=fork_of)))
                break
            except BaseException as error:
                channel.close()
                if not (isinstance(error, PeerFull) and swarm.sessions.give_way(peer_id)):
                    raise
        self.channel = channel
        swarm.sessions.add(peer_id, self)

    def _can_be_verified(self, step: Step, hidden: torch.Tensor) -> bool:
        """Whether one pass over all tokens makes the keys that the passes of this generation have made."""
        return not self.past.rope or len(self.past.runs(step, len(hidden))) == 1

    async def _verify(self, step: Step, hidden: torch.Tensor, output: torch.Tensor) -> None:
        """Have others compute a step's output from everything that led to it. Raises `Distrusted`."""
        everything = self.history.followed_by(hidden)
        codecs, (everything,) = self._caller.received(step.work, self.hop, everything)
        base = everything[:, -hidden.shape[1] :]
        answer = Answer(self.hop, "step", {"hidden_states": output}, {"hidden_states": base}, codecs.back)
        work = self.past.whole(step, everything).work
        again = ForwardAgain(self._caller, work, self.hop, everything, tokens=hidden.shape[1])
        await self._caller.verifier.check(answer, again)


def chunk_sizes(stages: Sequence[Stage], hidden: torch.Tensor, most: int) -> list[int]:
    """Tokens in each of the requests in which hidden states go to `stages`: at most `most`, and what fits a message."""
    rows, tokens, width = hidden.shape
    if stages[0].past.rope:
        return [tokens]
    channels = [stage.channel for stage in stages if stage.channel is not None]
    room = min((min(channel.remote_limit, channel.limits.max_payload) for channel in channels), default=2**62)
    # Half of it, because masks and prefixes go along; four bytes, because answers may be wider than what was sent.
    fit = room // 2 // (rows * width * max(hidden.itemsize, 4))
    count = -(-tokens // min(most, max(fit, 1)))
    return [tokens // count + (i < tokens % count) for i in range(count)]


def joined(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Consecutive tokens, (batch, tokens, hidden size), as one tensor."""
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), 1)
