"""Peers in this process: one CUDA context, and their event loop can be watched."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.swarm.loop import BackgroundLoop
from peer.server import Server
from peer.start.options import ServeOptions
from tests.tools.own_peer import start_server

_LOOP = BackgroundLoop()
"""The peers'; a client in this process has its own."""
_BEAT = 0.002
"""Seconds that the watched loop sleeps."""


@contextmanager
def serving(path: Path, spans: Sequence[str], **options: Any) -> Iterator[str]:
    """Peers for `spans` ("0:2") of a checkpoint; `options` are fields of `ServeOptions`. Yields an address."""
    servers: list[Server] = []
    try:
        for span in spans:
            known = tuple(servers[0].member.addresses[:1]) if servers else ()
            servers.append(_LOOP.run(start_server(path, ServeOptions(blocks=span, **options), known)))
        yield servers[0].member.addresses[0]
    finally:
        for server in servers:
            _LOOP.run(server.leave(at_once=True))


@dataclass
class Pauses:
    """Of the peers' event loop."""

    longest: float = 0.0
    """Seconds."""


@contextmanager
def watching_the_loop() -> Iterator[Pauses]:
    """How long the peers' event loop did nothing, while the block runs."""
    pauses = Pauses()

    async def beat() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_BEAT)
            pauses.longest = max(pauses.longest, time.monotonic() - before - _BEAT)

    beating = _LOOP.start(beat())
    try:
        yield pauses
    finally:
        beating.cancel()
