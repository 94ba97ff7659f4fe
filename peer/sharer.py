"""What a member does about weights: it gives what it has, fetches what it needs, and announces both."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from bootstrap.directory import Announcer
from bootstrap.member import Member
from peer.service.entrance import Entrance
from peer.service.weights import Weights
from peer.weights.options import WeightsOptions
from peer.weights.sharing import Shared, Sharing
from peer.weights.uploads import Uploads
from protocol.errors import BadUsage, SwarmError
from protocol.model.checkpoint import Checkpoint
from protocol.records import MAX_RECORD_BYTES, WeightsRecord
from protocol.tensors import Limits
from protocol.weights.cache import Cache
from protocol.weights.fetch import Network
from protocol.weights.making import hold
from protocol.weights.obtain import Library, Obtained, Pins

logger = logging.getLogger(__name__)

_WHILE_FETCHING = 5.0
"""Seconds between two announcements of how far a fetch is."""
_UNTIL_OFFERED = 120.0
"""Seconds that a model whose blocks are served has for being offered: its holder reads it once before."""
_LOOK_AGAIN = 1.0


class Sharer:
    """A member that answers streams: about weights at once, about blocks when `entrance.blocks` is set."""

    def __init__(self, member: Member, name: str, options: WeightsOptions, limits: Limits):
        self.member, self._name = member, name
        self._sharing, self._uploads = Sharing(self._announce), Uploads(options.upload_rate)
        self.entrance = Entrance(member.handshake, Weights(self._sharing, self._uploads), limits)
        network = Network(lambda: member, lambda: member.peer_id, member.directory.weights, shares=True)
        cache, membership = Cache(size=options.cache_size), member.membership
        self.library = Library(network, cache, Pins(membership.folder.models if membership is not None else cache.root))
        self._announcer = Announcer(member.directory, self.record)
        self._tasks = set[asyncio.Task[None]]()
        self._stopped = threading.Event()
        self._is_announced = False

    async def start(self) -> None:
        """Answer streams from now on."""
        await self.member.transport.serve(self.entrance.handle)
        self._spawn(self._announce_fetches())

    def step_back(self, while_computing: Callable[[], bool]) -> None:
        """Give weights more slowly while `while_computing()`."""
        self._uploads.computes = while_computing

    def record(self) -> WeightsRecord:
        """What this member announces now: of the models that it gives the newest, as far as a record holds them."""
        record = WeightsRecord(
            peer_id=self.member.peer_id, name=self._name, models=self._sharing.describe(), direct=self.member.door
        )
        while len(record.to_bytes()) > MAX_RECORD_BYTES:
            record = record.model_copy(update={"models": record.models[1:]})
        return record

    def describe(self) -> Iterator[str]:
        """What this member gives and has given, a line each: for people."""
        yield f"gave {self._uploads.pieces} pieces of weights, {self._uploads.bytes} bytes, since the start"
        for one in self._sharing.describe():
            yield f"    gives {one.model.name}@{one.manifest[:12]}: {one.held} of {one.wanted} bytes are here"

    async def obtain(self, name: str) -> Checkpoint | None:
        """The model that the swarm gives under a name, which is given from here too from now on; `None`: it has none.

        Raises `BadUsage`, `NoWeights`, `PeerUnreachable`, `UnsupportedModel`.
        """
        offer = await self.library.find(name)
        if offer is None and await self._is_served(name):
            logger.info("waiting until a member offers the files of %s", name)
            deadline = asyncio.get_running_loop().time() + _UNTIL_OFFERED
            while offer is None and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(_LOOK_AGAIN)
                offer = await self.library.find(name)
        if offer is None:
            return None
        obtained = await self.library.obtain(offer, self.give)
        logger.info("using %s of the swarm", obtained.label)
        return await asyncio.to_thread(obtained.open)

    async def reopen(self, folder: Path) -> Checkpoint | None:
        """The model of which a folder of the cache has what was fetched, given from here as well; `None`: it is none's.

        Raises `BadUsage`, `NoWeights`, `UnsupportedModel`.
        """
        obtained = await self.library.reopen(folder, self.give)
        return None if obtained is None else await asyncio.to_thread(obtained.open)

    def give(self, obtained: Obtained) -> None:
        """Give to others what there is of a model that is being fetched."""
        self._sharing.add(Shared(obtained.model, obtained.fetch.parts, obtained.fetch))

    def give_folder(self, checkpoint: Checkpoint) -> None:
        """Give a model that lies here, once all of it has been read."""
        self._spawn(self._hold(checkpoint))

    async def hold(self, checkpoint: Checkpoint) -> Shared:
        """Have all of a model here, and give it from now on. Raises `BadUsage`, `NoWeights`, `UnsupportedModel`."""
        if isinstance(checkpoint.source, Obtained):
            fetch = checkpoint.source.fetch
            await fetch.run(range(len(fetch.parts.manifest.pieces)))
            return Shared(checkpoint.model_id, fetch.parts, fetch)
        await asyncio.to_thread(checkpoint.fetch_all)
        held = await self._uploads.aside(lambda: hold(checkpoint, self.library.cache.kept, self._stopped))
        if held is None:
            raise BadUsage(f"Some of the weights of {checkpoint.name} are not on this machine; download all of it.")
        shared = Shared(checkpoint.model_id, held)
        self._sharing.add(shared)
        return shared

    async def stop(self) -> None:
        """Withdraw the announcement."""
        self._stopped.set()  # the process waits for its threads
        for task in self._tasks:
            task.cancel()
        await self._announcer.stop()

    async def leave(self) -> None:
        """Withdraw the announcement, and leave the swarm."""
        await self.stop()
        await self.member.shutdown()

    async def _hold(self, checkpoint: Checkpoint) -> None:
        try:
            shared = await self.hold(checkpoint)
        except SwarmError as error:
            logger.info("the files of this model are not given to others: %s", error)
        else:
            manifest = shared.held.manifest
            size = manifest.size / 1e6
            logger.info("giving %s@%s (%.1f MB) to others", shared.model.name, manifest.hash[:12], size)

    async def _is_served(self, name: str) -> bool:
        return any(model.name == name for model in await self.member.directory.models())

    async def _announce_fetches(self) -> None:
        while True:
            await asyncio.sleep(_WHILE_FETCHING)
            if self._sharing.is_fetching:
                self._announce()

    def _announce(self) -> None:
        if self._is_announced:
            self._announcer.refresh()
        else:
            self._is_announced = True
            self._announcer.start()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
