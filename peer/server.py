"""A peer's life: it loads a span, joins the swarm, announces itself, serves until it is told to stop, and leaves."""

import asyncio
import importlib
import logging
from collections.abc import Iterator

from bootstrap.directory import LIFETIME, Announcer
from peer.compute.scheduler import Scheduler
from peer.sharer import Sharer
from peer.start.assembly import Assembled, assemble, new_scheduler
from peer.start.options import ServeOptions
from protocol.errors import PeerFailed
from protocol.machine.imports import without_collection
from protocol.model.checkpoint import Checkpoint
from protocol.name import installed_version
from protocol.records import MAX_ADDRESSES, MemoryShares, ModelId, PeerRecord, PeerState

logger = logging.getLogger(__name__)

TELL_PERIOD = 600.0
"""Seconds between two lines in the log about the memory."""


class Server:
    """A running peer. Make one with `start`."""

    def __init__(
        self, options: ServeOptions, model_id: ModelId, assembled: Assembled, scheduler: Scheduler, sharer: Sharer
    ):
        self.options, self.model_id, self.member, self.sharer = options, model_id, sharer.member, sharer
        self.span, self.service = assembled.span, assembled.service
        self._speed, self._budget, self._scheduler = assembled.speed, assembled.budget, scheduler
        self._state = PeerState.ONLINE
        self._preload: asyncio.Task[object] | None = None
        """Imports what the first adapter needs, PEFT above all, while the peer serves already."""
        self._teller: asyncio.Task[None] | None = None
        self._announcer = Announcer(self.member.directory, self.record)

    @classmethod
    async def start(cls, options: ServeOptions, checkpoint: Checkpoint, joining: asyncio.Task[Sharer]) -> "Server":
        """Load and announce once `joining` is done. Raises as it does, and `BadUsage`, `UnsupportedModel`."""
        options.span(checkpoint.model_id.num_blocks)  # what is wrong with it need not wait for the join
        scheduler = new_scheduler(options)
        try:
            sharer = await joining  # first: what loads cannot be stopped, and most of a join is over by now
            assembled = await assemble(options, checkpoint, sharer.member, scheduler)
            server = cls(options, checkpoint.model_id, assembled, scheduler, sharer)
            sharer.entrance.blocks = server.service
            sharer.step_back(lambda: scheduler.is_at_work)
            await sharer.member.directory.announce(server.record(), LIFETIME)
        except BaseException:
            scheduler.close()
            raise
        server._announcer.start()
        server._teller = asyncio.create_task(server._tell_of_memory())
        server._preload = asyncio.create_task(asyncio.to_thread(_import_adapters))
        if checkpoint.source is None:
            sharer.give_folder(checkpoint)
        return server

    def record(self) -> PeerRecord:
        """What this peer announces now."""
        return PeerRecord(
            peer_id=self.member.peer_id,
            name=self.options.name,
            model=self.model_id,
            start=self.span.start,
            end=self.span.end,
            state=self._state,
            dtype=str(self.span.dtype).removeprefix("torch."),
            quantization=self.options.quantize,
            addresses=tuple(self.member.addresses)[:MAX_ADDRESSES],
            direct=self.member.door,
            speed=self._speed,
            memory=self.shares(),
            free_cache_tokens=self.service.memory.free_tokens,
            max_length=self.service.memory.max_length,
            trainable=self.service.trainable,
            sessions=self.service.memory.sessions,
            version=installed_version(),
        )

    def shares(self) -> MemoryShares:
        """What is used of each share of the memory now."""
        service = self.service
        return self._budget.shares(service.memory.free_tokens, service.kept_bytes, service.adapter_bytes)

    def describe(self) -> Iterator[str]:
        """What this peer serves now, a line each: for people."""
        record, service, memory = self.record(), self.service, self.service.memory
        yield f"{record.state}: blocks {record.start}:{record.end} of {record.model.name}, version {record.version}"
        yield f"{memory.sessions} sessions, {service.requests} requests being answered"
        yield f"{memory.free_tokens} of {memory.total_tokens} cache tokens free"
        yield f"memory used: {self.shares().describe()}"
        yield from self._scheduler.describe()
        for what, counts in (("steps", service.step_counts), ("training calls", service.training_counts)):
            yield f"{counts.items} {what} in {counts.passes} passes since the start"
        yield from self.sharer.describe()
        yield from self.member.describe()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then leave. Raises `PeerFailed` when the p2pd process or the device is lost."""
        device_lost = self.service.device_lost
        waiting = [asyncio.create_task(event.wait()) for event in (stop, self.member.lost, device_lost)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        lost = self.member.lost.is_set()
        await self.leave(at_once=device_lost.is_set())
        if device_lost.is_set():
            raise PeerFailed(
                f"The device {self.span.device} has failed for good, and the log says how, so this peer can compute "
                "nothing any more; start the peer again."
            )
        if lost:
            raise PeerFailed("The p2pd process died, so nobody can reach this peer any more; start the peer again.")

    async def leave(self, at_once: bool = False) -> None:
        """Take no new work, let clients take their sessions elsewhere, withdraw the record, close everything.

        `at_once`: clients get no time for it, as nothing more can be done for them.
        """
        self.service.drain()
        self._state = PeerState.DRAINING
        self._announcer.refresh()
        if not at_once:
            await self._drain()
        counts = self.service.step_counts
        logger.info("ran %d steps of generations in %d calls", counts.items, counts.passes)
        counts = self.service.training_counts
        logger.info("ran %d training calls in %d goes", counts.items, counts.passes)
        if self._teller:
            self._teller.cancel()
        await asyncio.gather(self._announcer.stop(), self.sharer.stop())
        self._scheduler.close()
        await self.member.shutdown()

    async def _tell_of_memory(self) -> None:
        """Log now and then what is used of the memory, if that is something else than before."""
        told = self.shares()
        while True:
            await asyncio.sleep(TELL_PERIOD)
            if (shares := self.shares()) != told:
                logger.info("memory used: %s", shares.describe())
                told = shares

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.options.drain_timeout
        while self.service.is_busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


def _import_adapters() -> None:
    with without_collection():
        importlib.import_module("peer.adapters.peft_trees")
