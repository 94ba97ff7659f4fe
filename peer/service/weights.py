"""ReadManifest, ReadHoldings, ReadPiece: models' files. These need no greeting, and are answered behind all else."""

import asyncio
import logging
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
import torch

from peer.service.connection import with_signs_of_life
from peer.weights.sharing import Sharing
from peer.weights.uploads import Uploads
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import BadRequest, OverQuota, PeerFailed
from protocol.weights.manifest import MAX_MANIFEST

logger = logging.getLogger(__name__)

T = TypeVar("T")
Request = pb.ReadManifest | pb.ReadHoldings | pb.ReadPiece


class Weights:
    """Answers those who fetch models' files."""

    def __init__(self, sharing: Sharing, uploads: Uploads):
        self._sharing, self._uploads = sharing, uploads

    async def converse(self, channel: Channel, first: Message) -> None:
        """Answer `first` and all that follows it on a stream, until that ends, which raises `SwarmError`."""
        channel.remote_limit = MAX_MANIFEST
        try:
            with self._uploads.stream(channel.remote):
                request = first
                while True:
                    await self._answer(channel, request)
                    request = await self._receive(channel)
        except OverQuota as error:
            await channel.fail(error)
            raise

    async def _receive(self, channel: Channel) -> Message:
        try:
            return await channel.receive_request()
        except BadRequest as error:  # no frame
            await channel.fail(error)
            raise

    async def _answer(self, channel: Channel, request: Message) -> None:
        body = request.body
        try:
            if isinstance(body, pb.ReadPiece):
                return await self._give_unless_changed(channel, body)
            if isinstance(body, pb.ReadManifest):
                answer = await self._read_manifest(body)
            elif isinstance(body, pb.ReadHoldings):
                holdings = self._sharing.find(body.manifest).holdings()
                answer = _bytes("holdings", np.packbits(holdings, bitorder="little").tobytes())
            else:
                raise BadRequest(f"A stream for weights has no {type(body).__name__} messages.")
        except (BadRequest, PeerFailed) as error:
            return await channel.fail(error)
        await channel.send(answer)

    async def _read_manifest(self, body: pb.ReadManifest) -> Message:
        if body.version != VERSION:
            raise BadRequest(f"The caller speaks protocol version {body.version}, this member {VERSION}; update one.")
        manifest = self._sharing.find(body.manifest).manifest
        return _bytes("manifest", await self._uploads.aside(lambda: manifest.data))

    async def _give_unless_changed(self, channel: Channel, body: pb.ReadPiece) -> None:
        try:
            await self._give(channel, body)
        except PeerFailed as error:  # its files are not what they were
            logger.warning("a model is not given to others any more: %s", error)
            self._sharing.remove(body.manifest)
            raise

    async def _give(self, channel: Channel, body: pb.ReadPiece) -> None:
        held = self._sharing.find(body.manifest)
        if not held.has(body.number):
            await channel.send(Message(pb.Result()))
            return
        holder = self._uploads.holder(held, body.number, channel.remote, body.insists)
        if holder is not None:
            await channel.send(Message(pb.Result(holder=holder)))
            return
        giving = self._uploads.giving(held, body.number, channel.remote) if body.shares else nullcontext()
        with giving:
            async with self._uploads.room:
                reading = asyncio.ensure_future(self._uploads.read(held, body.number))
                data = await with_signs_of_life(channel, reading)
                await channel.send(_bytes("piece", data))


def _bytes(name: str, data: bytes) -> Message:
    return Message(pb.Result(), {name: torch.frombuffer(bytearray(data), dtype=torch.uint8)})
