"""Open streams to peers, greeted once and used again."""

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from client.membership import Membership
from client.routing import Health
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.codecs import SUPPORTED
from protocol.errors import BadRequest, WrongModel
from protocol.model.checkpoint import same_weights
from protocol.tensors import Limits

_MAX_IDLE = 8


@dataclass(frozen=True)
class Wanted:
    """The model that a client uses."""

    config_hash: str
    digests: Mapping[str, str]


class Connections:
    """A pool of channels per peer, all greeted for one model."""

    def __init__(self, membership: Membership, wanted: Wanted, health: Health, patience: float):
        self._membership, self._wanted, self._health = membership, wanted, health
        self._patience = patience
        self._idle: dict[str, list[Channel]] = defaultdict(list)
        self.codecs: dict[str, frozenset[int]] = {}
        """Peer ID -> the codecs that it knows, as it said when it was greeted last."""

    @asynccontextmanager
    async def channel(self, peer_id: str) -> AsyncIterator[Channel]:
        """A channel for a few calls, given back at the end; closed when anything went wrong on it."""
        channel = self._take_idle(peer_id) or await self.open(peer_id)
        try:
            yield channel
        except BaseException:
            channel.close()
            raise
        if len(self._idle[peer_id]) < _MAX_IDLE:
            self._idle[peer_id].append(channel)
        else:
            channel.close()

    async def open(self, peer_id: str) -> Channel:
        """A new channel of the caller's own. Raises `PeerUnreachable`, `WrongKey`, `WrongModel`."""
        member = self._membership.member
        channel = Channel(await member.transport.connect(peer_id), Limits(), self._patience)
        try:
            await member.handshake.initiate(channel)
            await self._greet(channel)
        except BaseException:
            channel.close()
            raise
        return channel

    def forget(self, peer_id: str) -> None:
        """Close the idle channels to a peer: it failed, they are likely dead."""
        for channel in self._idle.pop(peer_id, []):
            channel.close()

    def close(self) -> None:
        """Close every idle channel."""
        for peer_id in list(self._idle):
            self.forget(peer_id)

    def _take_idle(self, peer_id: str) -> Channel | None:
        while self._idle[peer_id]:
            channel = self._idle[peer_id].pop()
            if self._membership.member.handshake.is_preferred(channel):
                return channel
            channel.close()  # the swarm's key is being changed
        return None

    async def _greet(self, channel: Channel) -> None:
        hello = pb.Hello(version=VERSION, config_hash=self._wanted.config_hash, weights=self._wanted.digests)
        begin = time.perf_counter()
        answer = await channel.call(Message(hello))
        self._health.measured(channel.remote, time.perf_counter() - begin)
        welcome = answer.body
        if not isinstance(welcome, pb.Welcome):
            raise BadRequest(f"Peer {channel.remote} did not greet.")
        channel.remote_limit = min(channel.limits.max_payload, welcome.max_frame)
        channel.remote_codecs = self.codecs[channel.remote] = SUPPORTED & {pb.RAW, *welcome.codecs}
        if not same_weights(self._wanted.digests, welcome.weights):
            raise WrongModel(f"Peer {channel.remote} serves other weights than this client's.")
