"""A peer within the test's own process, where everything of it can be looked at."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootstrap.member import Member, MemberOptions
from peer.server import Server
from peer.sharer import Sharer
from peer.start.options import ServeOptions
from protocol.model.checkpoint import open_checkpoint
from protocol.tensors import Limits

LOOP_THREAD = "the peer's event loop"
"""The name of the thread that it runs on."""


@dataclass(frozen=True)
class OwnPeer:
    """It serves as long as `own_peer`'s block lasts."""

    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def address(self) -> str:
        return self.server.member.addresses[0]


async def start_server(model: Path, options: ServeOptions, initial_peers: Sequence[str] = ()) -> Server:
    """A peer on the running event loop, on 127.0.0.1."""
    return await Server.start(options, open_checkpoint(str(model)), asyncio.create_task(_share(options, initial_peers)))


async def _share(options: ServeOptions, initial_peers: Sequence[str]) -> Sharer:
    member = await Member.join(MemberOptions(tuple(initial_peers), "127.0.0.1"))
    sharer = Sharer(member, options.name, options.weights, Limits())
    await sharer.start()
    return sharer


@contextmanager
def own_peer(model: Path, **options: Any) -> Iterator[OwnPeer]:
    """A peer that has founded a swarm; `options`: fields of `ServeOptions`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=LOOP_THREAD, daemon=True)
    thread.start()

    starting = start_server(model, ServeOptions(drain_timeout=0.0, **options))
    server = asyncio.run_coroutine_threadsafe(starting, loop).result(60)
    try:
        yield OwnPeer(server, loop)
    finally:
        asyncio.run_coroutine_threadsafe(server.leave(at_once=True), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
