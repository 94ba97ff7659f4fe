"""Adapters that were given to peers of late."""

import asyncio
from collections import OrderedDict

from client.adapters.bundle import AdapterBundle
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message

_MAX_PUTS = 256
"""That are remembered."""


class Puts:
    """The adapters put of late. One that several micro-batches in flight find missing at the same time is sent once."""

    def __init__(self) -> None:
        self._latest = OrderedDict[tuple[str, bytes], asyncio.Future[None]]()

    def last_done(self, peer_id: str, key: bytes) -> "asyncio.Future[None] | None":
        """The last put of an adapter to a peer, unless it is going on."""
        latest = self._latest.get((peer_id, key))
        return latest if latest is not None and latest.done() else None

    async def put(self, channel: Channel, bundle: AdapterBundle, seen: "asyncio.Future[None] | None") -> None:
        """Give the peer an adapter that it missed after the put `seen`: by waiting, if another put has begun since.

        Raises `BadAdapter` when the peer refuses it, and other `SwarmError`s.
        """
        slot = (channel.remote, bundle.key)
        latest = self._latest.get(slot)
        if latest is not None and latest is not seen:
            await asyncio.wait({latest})
            return
        self._latest[slot] = done = asyncio.get_running_loop().create_future()
        self._latest.move_to_end(slot)
        while len(self._latest) > _MAX_PUTS:
            self._latest.popitem(last=False)
        try:
            await channel.call(Message(pb.PutAdapter(manifest=bundle.manifest), bundle.tensors))
        finally:
            done.set_result(None)
