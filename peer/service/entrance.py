"""Where all streams come in: who belongs to the swarm, and whether it is about weights or about blocks."""

import logging
from typing import Protocol

from peer.service.weights import Request, Weights
from protocol.channel import Channel, Message
from protocol.errors import PeerFull, SwarmError
from protocol.membership.handshake import Handshake
from protocol.stream import Stream
from protocol.tensors import Limits

logger = logging.getLogger(__name__)

_PATIENCE = 60.0


class Blocks(Protocol):
    """What answers the streams that are about blocks."""

    async def serve(self, channel: Channel, first: Message) -> None:
        """A stream, from its first request to its end."""


class Entrance:
    """Lets members of the swarm in. Weights are given at once, blocks are served as soon as `blocks` is set."""

    def __init__(self, handshake: Handshake, weights: Weights, limits: Limits):
        self._handshake, self._weights, self._limits = handshake, weights, limits
        self.blocks: Blocks | None = None

    async def handle(self, stream: Stream) -> None:
        """One stream's life."""
        channel = Channel(stream, self._limits, _PATIENCE)
        try:
            first = await self._receive_first(channel)
            if isinstance(first.body, Request):
                await self._weights.converse(channel, first)
            elif self.blocks is not None:
                await self.blocks.serve(channel, first)
        except SwarmError as error:
            logger.debug("stream of %s ended: %s", stream.remote, error)

    async def _receive_first(self, channel: Channel) -> Message:
        try:
            first = await self._handshake.respond(channel)
            if self.blocks is None and not isinstance(first.body, Request):
                raise PeerFull("This member gives weights, and serves no blocks at present.")
        except SwarmError as error:
            await channel.fail(error)
            raise
        return first
