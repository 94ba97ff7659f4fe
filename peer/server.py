"""A peer: loads a span, joins the swarm, announces itself, serves until it is told to stop."""

import asyncio
import importlib
import logging
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from bootstrap.directory import Announcer
from bootstrap.member import Member
from peer.compute.scheduler import Priority, Scheduler
from peer.start.assembly import _JOINED, _JOINED_ON_CPU, ServeOptions, _choose_blocks, _load, _load_span, _Loaded
from protocol.errors import PeerFailed
from protocol.machine.imports import without_collection
from protocol.name import NAME
from protocol.records import PeerRecord, PeerState

logger = logging.getLogger(__name__)

_ANNOUNCE_PERIOD, _RECORD_LIFETIME = 20.0, 60.0


def own_version() -> str:
    """The installed version."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "0+source"


class Server:
    """A running peer. Make one with `start`."""

    def __init__(self, options: ServeOptions, loaded: "_Loaded", member: Member):
        self.options, self.member = options, member
        self.span, self.service = loaded.span, loaded.service
        self._speed, self._scheduler = loaded.speed, loaded.scheduler
        self._state = PeerState.ONLINE
        self._preload: asyncio.Task[object] | None = None
        """Imports what the first adapter needs, PEFT above all, while the peer serves already."""
        self._announcer = Announcer(member.directory, self.record, _ANNOUNCE_PERIOD, _RECORD_LIFETIME)

    @classmethod
    async def start(cls, options: ServeOptions, joining: asyncio.Task[Member]) -> "Server":
        """Load and announce once `joining` is done. Raises as it does, and `UnsupportedModel`."""
        on_cpu = torch.device(options.device).type == "cpu"
        scheduler = Scheduler(joined_size=_JOINED_ON_CPU if on_cpu else _JOINED)
        try:
            member = await joining  # first: what loads cannot be stopped, and most of a join is over by now
            blocks = options.blocks or await _choose_blocks(options, member)
            span = await scheduler.submit(Priority.CALL, partial(_load_span, options, blocks))
            loaded = await scheduler.submit(Priority.CALL, partial(_load, options, span, scheduler, member))
            server = cls(options, loaded, member)
            await member.transport.serve(server.service.handle)
            await member.directory.announce(server.record(), _RECORD_LIFETIME)
        except BaseException:
            scheduler.close()
            raise
        server._announcer.start()
        server._preload = asyncio.create_task(asyncio.to_thread(_import_adapters))
        return server

    def record(self) -> PeerRecord:
        """What this peer announces now."""
        return PeerRecord(
            peer_id=self.member.peer_id,
            name=self.options.name,
            model=self.options.checkpoint.model_id,
            start=self.span.start,
            end=self.span.end,
            state=self._state,
            dtype=str(self.span.dtype).removeprefix("torch."),
            quantization=self.options.quantization,
            addresses=tuple(self.member.addresses)[:20],
            direct=self.member.door,
            speed=self._speed,
            free_cache_tokens=self.service.memory.free_tokens,
            max_length=self.service.memory.max_length,
            sessions=self.service.load.sessions,
            version=own_version(),
        )

    def describe(self) -> Iterator[str]:
        """What this peer serves now, a line each: for people."""
        record, load, memory = self.record(), self.service.load, self.service.memory
        yield f"{record.state}: blocks {record.start}:{record.end} of {record.model.name}, version {record.version}"
        yield f"{load.sessions} sessions, {load.calls} requests being answered"
        yield f"{memory.free_tokens} of {memory.total_tokens} cache tokens free"
        yield from self._scheduler.describe()
        for what, counts in (("steps", self.service.tally), ("training calls", self.service.call_tally)):
            yield f"{counts.steps} {what} in {counts.calls} passes since the start"
        yield from self.member.describe()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then leave. Raises `PeerFailed` when the p2pd process is lost."""
        waiting = [asyncio.create_task(stop.wait()), asyncio.create_task(self.member.lost.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        lost = self.member.lost.is_set()
        await self.leave()
        if lost:
            raise PeerFailed("The p2pd process died, so nobody can reach this peer any more; start the peer again.")

    async def leave(self) -> None:
        """Take no new work, let clients take their sessions elsewhere, withdraw the record, close everything."""
        self.service.draining = True
        self._state = PeerState.DRAINING
        self._announcer.refresh()
        await self._drain()
        tally = self.service.tally
        logger.info("ran %d steps of generations in %d calls", tally.steps, tally.calls)
        tally = self.service.call_tally
        logger.info("ran %d training calls in %d goes", tally.steps, tally.calls)
        await self._announcer.stop()
        self._scheduler.close()
        await self.member.shutdown()

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.options.drain_timeout
        while self.service.is_busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


def _import_adapters() -> None:
    with without_collection():
        importlib.import_module("peer.adapters.peft_trees")
