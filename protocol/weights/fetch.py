"""Fetching pieces of a model from several members at once, the rarest first; each is checked before it counts.

Who gives a wrong piece is asked no more. Who stalls or dies is left, and asked again after a while. A member that has
many askers names, in the place of a piece, another that it has given it to: so of several copies that are made at the
same time little more than one leaves the first holder.
"""

import asyncio
import errno
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.connections import End, dial
from protocol.errors import BadRequest, BadUsage, NoWeights, PeerUnreachable, SwarmError
from protocol.records import PeerIdText, WeightsRecord
from protocol.tensors import Limits
from protocol.transport.race import first
from protocol.weights.manifest import MAX_MANIFEST, Manifest
from protocol.weights.parts import Parts
from protocol.weights.progress import Progress

logger = logging.getLogger(__name__)

SILENCE = 10.0
"""Seconds without a sign of life after which a member is lost."""
_STREAMS = 2
"""To each member: while a piece of one is checked and written, the other's travels."""
_LOOK_UP, _LOOK_AGAIN = 3.0, 0.5
"""Seconds between two look-ups of who has pieces, and between two questions to a member which it has by now."""
_ELSEWHERE = 2.0
"""Seconds that a member which was named in the place of a piece has for giving it. It may be getting it just now."""
_LONGEST = 600.0
"""Seconds for a whole piece, though there are signs of life: many may wait for a member that gives slowly."""
_OVERDUE = 3.0
"""Seconds after which a piece on its way is asked of another member too, when there is nothing else to ask for."""
PATIENCE = 60.0
"""Seconds for which nobody may have any piece."""
_FIRST_REST, _LONGEST_REST = 2.0, 60.0
"""Seconds for which a member that failed is not asked; the time doubles each time."""
_NEXT_HOLDER = 1.0
"""Seconds for a manifest, until another member is asked for it too."""
_LIMITS = Limits(max_header=2**16, max_payload=MAX_MANIFEST, max_tensors=1)
_PEER_ID = TypeAdapter[str](PeerIdText)


class Wrong(SwarmError):
    """A member gave bytes that are not what the manifest says."""


class Shelf(Protocol):
    """What says whether there is room."""

    def make_room(self, more: int, keep: str) -> None:
        """See `protocol.weights.cache.Cache`."""


@dataclass(frozen=True)
class Network:
    """The swarm, as a fetch sees it."""

    end: Callable[[], End]
    """This member, as it is now."""
    me: Callable[[], str]
    """Its ID."""
    look_up: Callable[[], Awaitable[list[WeightsRecord]]]
    """Who gives what."""
    shares: bool = False
    """Whether this member gives to others what it gets."""

    async def open(self, peer_id: str) -> Channel:
        """A channel to a member. Raises as `dial`."""
        channel = await dial(self.end(), peer_id, SILENCE)
        channel.limits = _LIMITS
        return channel

    async def holders(self, manifest: str) -> list[str]:
        """IDs of the other members that have announced pieces of a model."""
        records = await self.look_up()
        return [
            record.peer_id
            for record in records
            if record.peer_id != self.me() and any(one.manifest == manifest for one in record.models)
        ]


async def fetch_manifest(network: Network, manifest: str) -> Manifest:
    """The manifest of this hash, from whoever gives it. Raises `NoWeights`."""
    holders = await network.holders(manifest)
    random.shuffle(holders)
    reason = ""
    while holders:
        try:
            channel = await first([partial(network.open, peer_id) for peer_id in holders], _NEXT_HOLDER)
        except SwarmError as error:  # none of them can be reached
            reason = f" ({error})"
            break
        holders.remove(channel.remote)
        try:
            return await _read_manifest(channel, manifest)
        except SwarmError as error:
            reason = f" ({error})"
    raise NoWeights(f"Nobody in the swarm gives the manifest {manifest[:12]}…{reason}.")


async def _read_manifest(channel: Channel, manifest: str) -> Manifest:
    try:
        request = pb.ReadManifest(version=VERSION, manifest=bytes.fromhex(manifest))
        data = (await channel.call(Message(request))).tensor("manifest")
        return await asyncio.to_thread(Manifest.from_bytes, _bytes_of(data), manifest)
    except SwarmError as error:
        logger.warning("member %s did not give the manifest %s…: %s", channel.remote, manifest[:12], error)
        raise
    finally:
        channel.close()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise BadRequest("Bytes came as something else.")
    return tensor.numpy().tobytes()


class Fetch:
    """Brings pieces of one model here. For use on one event loop."""

    def __init__(self, parts: Parts, name: str, network: Network, shelf: Shelf):
        self.parts, self._name, self._network, self._shelf = parts, name, network, shelf
        self.progress: Progress | None = None
        """Of the fetch that is going on."""
        self._one_at_a_time = asyncio.Lock()

    async def run(self, numbers: Collection[int]) -> None:
        """Returns when all these pieces are here, on the disk.

        Raises `NoWeights` when nobody gives some of them, `BadUsage` when there is no room.
        """
        async with self._one_at_a_time:
            missing = await asyncio.to_thread(self.parts.missing, numbers)
            try:
                if missing:
                    size = self.parts.manifest.bytes_of(missing)
                    await asyncio.to_thread(self._shelf.make_room, size, self.parts.manifest.hash)
                    await self._fetch(missing, size)
                await asyncio.to_thread(self.parts.settle, numbers)
            except OSError as error:
                raise _unwritten(error, self.parts) from error

    async def _fetch(self, missing: list[int], size: int) -> None:
        self.progress = Progress(self._name, size)
        try:
            await _Crew(self.parts, self._name, self._network, missing, self.progress).run()
        finally:
            self.progress.close()
            self.progress = None


def _unwritten(error: OSError, parts: Parts) -> BadUsage:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadUsage(
            f"The disk is full: what was fetched does not fit {parts.folder}; make room and start again (what is there "
            "is kept), or have the cache elsewhere ($HIVETUNE_CACHE)."
        )
    return BadUsage(f"{parts.folder} cannot be written ({error.strerror}); have the cache elsewhere ($HIVETUNE_CACHE).")


@dataclass
class _Member:
    """One that gives pieces."""

    peer_id: str
    holdings: np.ndarray
    """Which pieces it has: bool."""
    away: np.ndarray
    """For each piece until when it is not asked for it, as it has named another: seconds, 0 where it has not."""
    asked: float = float("-inf")
    """When it said last what it has."""
    last_piece: float = float("-inf")
    rest: float = 0.0
    resting_until: float = 0.0
    is_wrong: bool = False
    streams: set["asyncio.Task[None]"] = field(default_factory=set)


class _Crew:
    """All that goes on for one call of `Fetch.run`."""

    def __init__(self, parts: Parts, name: str, network: Network, missing: Collection[int], progress: Progress):
        self._parts, self._name, self._network, self._progress = parts, name, network, progress
        self._id = bytes.fromhex(parts.manifest.hash)
        self._left = set(missing)
        self._free = self._none()
        """Pieces that are to come and are not on their way: bool."""
        self._free[list(missing)] = True
        self._flying: dict[int, dict[str, float]] = {}
        """Piece -> the members that are asked for it, and since when."""
        self._counts = np.zeros(len(self._free), dtype=np.int32)
        """How many members have each piece."""
        self._members: dict[str, _Member] = {}
        self._news = asyncio.Condition()
        self._failure: OSError | None = None
        self._last_piece = self._now()
        self._next_look_up = self._now()

    async def run(self) -> None:
        """Until nothing is left. Raises `NoWeights`, `OSError`."""
        try:
            while self._left and self._failure is None:
                if self._now() >= self._next_look_up:
                    await self._look_for_members()
                    self._next_look_up = self._now() + (_LOOK_UP if self._members else _LOOK_AGAIN)
                for member in self._members.values():
                    self._employ(member)
                self._check_hope()
                await self._wait(_LOOK_AGAIN)
        finally:
            streams = [task for member in self._members.values() for task in member.streams]
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    def _check_hope(self) -> None:
        if self._flying or self._now() < self._last_piece + PATIENCE:
            return
        size = self._parts.manifest.bytes_of(self._left)
        raise NoWeights(
            f"Nobody in the swarm gives the last {len(self._left)} pieces ({size / 1e6:,.1f} MB) of {self._name}; "
            "start a member that has them (`peer share FOLDER`). What is here already is kept."
        )

    async def _look_for_members(self) -> None:
        try:
            found = await self._network.holders(self._parts.manifest.hash)
        except SwarmError as error:
            logger.debug("the directory could not be read: %s", error)
            found = []
        for peer_id in found:
            self._member(peer_id)

    def _member(self, peer_id: str) -> _Member:
        if peer_id not in self._members:
            self._members[peer_id] = _Member(peer_id, self._none(), np.zeros(len(self._free)))
        return self._members[peer_id]

    def _employ(self, member: _Member) -> None:
        if member.is_wrong or self._now() < member.resting_until:
            return
        while len(member.streams) < _STREAMS:
            task = asyncio.create_task(self._draw(member))
            member.streams.add(task)
            task.add_done_callback(member.streams.discard)

    async def _draw(self, member: _Member) -> None:
        """One stream's life."""
        channel: Channel | None = None
        try:
            channel = await self._network.open(member.peer_id)
            while self._left and not member.is_wrong:
                if self._now() > member.asked + _LOOK_AGAIN:
                    await self._ask_what_is_there(channel, member)
                number = self._pick(member)
                if number is None:
                    await self._wait(_LOOK_AGAIN)
                else:
                    await self._take(channel, member, number)
        except Wrong as error:
            logger.warning("member %s is asked no more: %s", member.peer_id, error)
        except SwarmError as error:
            member.rest = min(2 * member.rest, _LONGEST_REST) if member.rest else _FIRST_REST
            member.resting_until = self._now() + max(member.rest, error.retry_after)
            logger.info("member %s gives nothing at present: %s", member.peer_id, error)
        except OSError as error:
            self._failure = error
        finally:
            if channel is not None:
                channel.close()
            if member.is_wrong or member.resting_until > self._now():
                self._set_holdings(member, self._none())
            await self._tell()

    async def _ask_what_is_there(self, channel: Channel, member: _Member) -> None:
        member.asked = self._now()
        answer = await channel.call(Message(pb.ReadHoldings(manifest=self._id)))
        bits = np.frombuffer(_bytes_of(answer.tensor("holdings")), dtype=np.uint8)
        if len(bits) != (len(self._free) + 7) // 8:
            raise self._wrong(member, "it holds another number of pieces than there are.")
        self._set_holdings(member, np.unpackbits(bits, count=len(self._free), bitorder="little").astype(bool))

    def _set_holdings(self, member: _Member, holdings: np.ndarray) -> None:
        self._counts += holdings.astype(np.int32) - member.holdings.astype(np.int32)
        member.holdings = holdings

    def _pick(self, member: _Member) -> int | None:
        """A piece to ask this member for: one that few have. `None` when it has none that is of use."""
        useful = np.flatnonzero(self._free & member.holdings & (member.away < self._now()))
        if not len(useful):
            return self._overdue(member)
        counts = self._counts[useful]
        return int(random.choice(useful[counts == counts.min()]))

    def _overdue(self, member: _Member) -> int | None:
        late = self._now() - _OVERDUE
        for number, askers in self._flying.items():
            if member.holdings[number] and member.peer_id not in askers and max(askers.values()) < late:
                return number
        return None

    async def _take(self, channel: Channel, member: _Member, number: int) -> None:
        self._free[number] = False
        self._flying.setdefault(number, {})[member.peer_id] = self._now()
        request = pb.ReadPiece(
            manifest=self._id, number=number, shares=self._network.shares, insists=bool(member.away[number])
        )
        try:
            async with asyncio.timeout(_LONGEST):
                answer = await channel.call(Message(request))
            if answer.tensors:
                await self._put(member, number, answer)
            else:
                self._go_elsewhere(member, number, getattr(answer.body, "holder", ""))
        except TimeoutError as error:
            raise PeerUnreachable(f"it gave no piece within {_LONGEST:g} s.") from error
        finally:
            self._flying[number].pop(member.peer_id, None)
            if not self._flying[number]:
                del self._flying[number]
                self._free[number] = number in self._left
            await self._tell()

    async def _put(self, member: _Member, number: int, answer: Message) -> None:
        data = answer.tensor("piece")
        if data.dtype != torch.uint8 or data.ndim != 1 or number not in self._left:
            if number in self._left:
                raise self._wrong(member, "it sent something else than a piece.")
            return
        if not await asyncio.to_thread(self._parts.write, number, data.numpy().data):
            raise self._wrong(member, f"piece {number} of {self._name} that it sent is not what the manifest says.")
        if number in self._left:
            self._left.discard(number)
            member.rest, member.last_piece = 0.0, self._now()
            self._last_piece = self._now()
            recent = sum(one.last_piece > self._last_piece - _OVERDUE for one in self._members.values())
            self._progress.add(self._parts.manifest.pieces[number].size, recent)

    def _wrong(self, member: _Member, why: str) -> Wrong:
        member.is_wrong = True  # at once: it has other streams
        return Wrong(why)

    def _go_elsewhere(self, member: _Member, number: int, holder: str) -> None:
        member.away[number] = self._now() + _ELSEWHERE
        with suppress(ValidationError):
            if _PEER_ID.validate_python(holder) != self._network.me():
                other = self._member(holder)
                self._employ(other)
                if other.streams and not other.holdings[number]:
                    other.holdings[number] = True
                    self._counts[number] += 1

    async def _wait(self, seconds: float) -> None:
        """Until there is something new, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _none(self) -> np.ndarray:
        return np.zeros(len(self._parts.manifest.pieces), dtype=bool)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
