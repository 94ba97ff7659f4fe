"""TODO."""

import asyncio
import time
from collections import OrderedDict

from client.adapters.bundle import AdapterBundle
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message, OnWorking
from protocol.errors import PeerFailed, UnknownAdapter

_MAX_PUTS = 256


class Puts:
    """The adapters put of late. What several micro-batches in flight find missing at the same time is sent once."""

    def __init__(self) -> None:
        self._latest = OrderedDict[tuple[str, bytes], asyncio.Future[None]]()

    def last_done(self, peer_id: str, key: bytes) -> "asyncio.Future[None] | None":
        """The last put of an adapter to a peer, unless it is going on."""
        latest = self._latest.get((peer_id, key))
        return latest if latest is not None and latest.done() else None

    async def put(self, channel: Channel, bundle: AdapterBundle, seen: "asyncio.Future[None] | None") -> None:
        """Give the peer an adapter that it missed after the put `seen`: by waiting, if there was another since."""
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


async def call_with_adapter(
    puts: Puts, channel: Channel, message: Message, bundle: AdapterBundle | None, on_working: OnWorking | None = None
) -> tuple[Message, float]:
    """Call; when the peer does not hold the adapter, put it and call again. Returns the seconds of the call alone, too.

    One that is being trained is new to every peer after each optimizer step, and is put first; others may be there.
    """
    if bundle and bundle.is_trained:
        await puts.put(channel, bundle, None)
    seen = puts.last_done(channel.remote, bundle.key) if bundle else None
    try:
        return await _timed_call(channel, message, on_working)
    except UnknownAdapter:
        if bundle is None:
            raise PeerFailed(f"Peer {channel.remote} misses an adapter that the call does not name.") from None
    await puts.put(channel, bundle, seen)
    return await _timed_call(channel, message, on_working)


async def _timed_call(channel: Channel, message: Message, on_working: OnWorking | None) -> tuple[Message, float]:
    begin = time.perf_counter()
    answer = await channel.call(message, on_working)
    return answer, time.perf_counter() - begin
