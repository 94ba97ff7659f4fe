"""Open streams to peers of one model, greeted once and used again."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.codecs import SUPPORTED
from protocol.errors import BadRequest, NoConnection, PeerUnreachable, WrongModel
from protocol.records import ModelVersion, same_weights
from protocol.stream import Carrier, Stream
from protocol.tensors import Limits

_MAX_IDLE = 8


class Dialer(Protocol):
    """What a member connects with."""

    async def connect(self, peer_id: str, carrier: Carrier) -> Stream:
        """A new stream to `peer_id`. Raises `PeerUnreachable`."""


class Greeter(Protocol):
    """What a member's streams begin with."""

    async def initiate(self, channel: Channel) -> None:
        """Before the first request. Raises `NotAMember` when the other end is no member of our swarm."""


class End(Protocol):
    """The caller, as a member of the swarm."""

    @property
    def transport(self) -> Dialer:
        """What it connects with."""

    @property
    def handshake(self) -> Greeter:
        """What its streams begin with."""


class Connections:
    """A pool of channels per peer, all greeted for the model `wanted`.

    `end` returns the caller as it is now: it may have joined anew. `patience` (seconds): see `Channel`. `met` is called
    with the peer's ID and the seconds of the greeting's round trip, for each new connection.
    """

    def __init__(
        self,
        end: Callable[[], End],
        wanted: ModelVersion,
        patience: float,
        met: Callable[[str, float], None],
        carrier: Carrier = "auto",
    ):
        self._end, self._wanted, self._patience, self._met = end, wanted, patience, met
        self._carrier = carrier
        self._idle: dict[str, list[Channel]] = defaultdict(list)
        self.codecs: dict[str, frozenset[int]] = {}
        """Peer ID -> the codecs that the peer knows, as its last greeting said."""

    @asynccontextmanager
    async def channel(self, peer_id: str) -> AsyncIterator[Channel]:
        """A channel for a few requests, given back at the end, or closed when anything went wrong on it."""
        channel = self._idle[peer_id].pop() if self._idle[peer_id] else await self.open(peer_id)
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
        """A new, greeted channel that the caller must close.

        Raises `NoConnection`, `PeerUnreachable`, `NotAMember`, `WrongModel`.
        """
        channel = await dial(self._end(), peer_id, self._patience, self._carrier)
        try:
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

    async def _greet(self, channel: Channel) -> None:
        hello = pb.Hello(version=VERSION, config_hash=self._wanted.model_id.config_hash, weights=self._wanted.digests)
        begin = time.perf_counter()
        answer = await channel.call(Message(hello))
        self._met(channel.remote, time.perf_counter() - begin)
        welcome = answer.body
        if not isinstance(welcome, pb.Welcome):
            raise BadRequest(f"Peer {channel.remote} did not greet.")
        channel.remote_limit = min(channel.limits.max_payload, welcome.max_frame)
        channel.remote_codecs = self.codecs[channel.remote] = SUPPORTED & {pb.RAW, *welcome.codecs}
        if not same_weights(self._wanted.digests, welcome.weights):
            raise WrongModel(f"Peer {channel.remote} serves other weights than ours.")


async def dial(end: End, peer_id: str, patience: float, carrier: Carrier = "auto") -> Channel:
    """A new channel on which both ends have shown each other that they belong to the swarm; the caller must close it.

    Raises `NoConnection`, `PeerUnreachable`, `NotAMember`.
    """
    try:
        async with asyncio.timeout(patience):
            stream = await end.transport.connect(peer_id, carrier)
    except PeerUnreachable as error:
        raise NoConnection(str(error)) from error
    except TimeoutError as error:
        raise NoConnection(f"Peer {peer_id} cannot be reached within {patience:g} s.") from error
    channel = Channel(stream, Limits(), patience)
    try:
        await end.handshake.initiate(channel)
    except BaseException:
        channel.close()
        raise
    return channel
