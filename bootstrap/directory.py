"""The directory of peers: what members announce in the DHT, and looking it up."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from hivemind.dht import DHTNode

from bootstrap.neighbours import Neighbours
from bootstrap.storage import MAX_LIFETIME
from bootstrap.validator import MEMBERS_KEY, MODELS_KEY, WEIGHTS_KEY, complaints_key, model_key
from protocol.errors import BadRequest
from protocol.records import (
    MAX_RECORD_BYTES,
    Complaint,
    MemberRecord,
    ModelId,
    PeerRecord,
    PeerState,
    WeightsRecord,
)

PERIOD = 20.0
"""Seconds between two announcements of a peer."""
LIFETIME = 60.0
"""Seconds for which an announcement holds."""
RETRY = 5.0
"""Seconds until the next attempt after an announcement that failed."""
MAX_MODELS = 256
WITHDRAW_TIMEOUT = 1.5
_log = logging.getLogger(__name__)
R = TypeVar("R", ModelId, PeerRecord, Complaint, MemberRecord, WeightsRecord)
Announcement = PeerRecord | WeightsRecord


class Directory:
    """Announces and looks up peers in a DHT. All methods raise `PeerUnreachable` when this member is cut off."""

    def __init__(self, node: DHTNode, neighbours: Neighbours, learn: Callable[[Announcement], None]):
        """`learn` is called with every member's record that is looked up."""
        self._node = node
        self._neighbours = neighbours
        self._learn = learn
        self._expirations: dict[str, float] = {}

    async def announce(self, record: Announcement, lifetime: float) -> bool:
        """Announce `record` for `lifetime` seconds, instead of what this member announced before for that model, or of
        the weights that it gives.

        Returns whether the DHT took it. Raises `BadRequest` for a record or a lifetime that is too long.
        """
        if len(record.to_bytes()) > MAX_RECORD_BYTES or not 0 < lifetime < MAX_LIFETIME:
            raise BadRequest(
                f"A record may have {MAX_RECORD_BYTES} bytes and hold for {MAX_LIFETIME:g} s; this one has "
                f"{len(record.to_bytes())} and {lifetime:g} s."
            )
        return await self._store(record, time.time() + lifetime)

    async def withdraw(self, record: Announcement) -> None:
        """Take the announcement back: from now on nobody sees the peer, or the weights."""
        # The DHT keeps the record that expires later, so this one expires no sooner than the one that it replaces.
        nothing = {"state": PeerState.OFFLINE} if isinstance(record, PeerRecord) else {"models": ()}
        await self._store(record.model_copy(update=nothing), time.time() + 1.0)

    async def peers(self, config_hash: str) -> list[PeerRecord]:
        """The peers that serve blocks of a model, as the DHT's members hold them now; sorted by start, then ID."""
        key = model_key(config_hash)
        return self._learned((await self._look_up([key]))[key])

    async def weights(self) -> list[WeightsRecord]:
        """Who gives which models' files; sorted by ID."""
        records = _parse(_current((await self._look_up([WEIGHTS_KEY]))[WEIGHTS_KEY]), WeightsRecord)
        for record in records:
            self._learn(record)
        return sorted((record for record in records if record.models), key=lambda record: record.peer_id)

    async def complain(self, complaint: Complaint) -> None:
        """Publish this member's complaint for a model for ten minutes, in place of an earlier one."""
        await self._neighbours.ensure()
        expiration = time.time() + MAX_LIFETIME - 1
        key = complaints_key(complaint.model.config_hash)
        await self._node.store(key, complaint.to_bytes(), expiration, subkey=complaint.peer_id)

    async def complaints(self, config_hash: str) -> Counter[str]:
        """Peer ID -> how many members complain of that peer's answers, for one model."""
        key = complaints_key(config_hash)
        said = _parse((await self._look_up([key]))[key], Complaint)
        return Counter(peer_id for complaint in said for peer_id in {accused.peer_id for accused in complaint.accused})

    async def announce_member(self, record: MemberRecord) -> None:
        """Say that this process of a private swarm's member is up, for `LIFETIME` seconds."""
        await self._neighbours.ensure()
        await self._node.store(MEMBERS_KEY, record.to_bytes(), time.time() + LIFETIME, subkey=record.peer_id)

    async def members(self) -> list[MemberRecord]:
        """The processes of members that are up, in a private swarm."""
        return _parse((await self._look_up([MEMBERS_KEY]))[MEMBERS_KEY], MemberRecord)

    async def models(self) -> dict[ModelId, list[PeerRecord]]:
        """Every model of the swarm with its peers; a model without peers is left out."""
        listed = _parse((await self._look_up([MODELS_KEY]))[MODELS_KEY], ModelId)
        keys = sorted({model_key(model.config_hash) for model in listed})[:MAX_MODELS]
        found = (await self._look_up(keys)).values() if keys else ()
        return {_usual_model(records): records for records in map(self._learned, found) if records}

    def _learned(self, values: dict[str, Any]) -> list[PeerRecord]:
        records = _peers(values)
        for record in records:
            self._learn(record)
        return records

    async def _store(self, record: Announcement, expiration: float) -> bool:
        await self._neighbours.ensure()
        values = {WEIGHTS_KEY: record.to_bytes()}
        if isinstance(record, PeerRecord):
            values = {model_key(record.model.config_hash): record.to_bytes(), MODELS_KEY: record.model.to_bytes()}
        key = next(iter(values))
        expiration = max(expiration, self._expirations.get(key, 0.0) + 0.001)
        self._expirations[key] = expiration
        stored = await self._node.store_many(
            list(values), list(values.values()), expiration, subkeys=[record.peer_id] * len(values)
        )
        return all(stored.values()) and not self._neighbours.cut_off

    async def _look_up(self, keys: Collection[str]) -> dict[str, dict[str, Any]]:
        await self._neighbours.ensure()
        found = await self._search(keys)
        if self._neighbours.cut_off:
            # The last known member fell silent during the search, so the result is only what this member holds.
            await self._neighbours.ensure()
            found = await self._search(keys)
        return found

    async def _search(self, keys: Collection[str]) -> dict[str, dict[str, Any]]:
        # NaN: no answer's expiration time is ever sufficient to end the search. All replicas' records are merged, and a
        # member that claims an infinite expiration time cannot hide what others hold.
        found = await self._node.get_many(keys, sufficient_expiration_time=math.nan)
        return {key: value.value if value is not None else {} for key, value in found.items()}


class Announcer:
    """Keeps a record announced: every `period` seconds and whenever `refresh` is called."""

    def __init__(
        self,
        directory: Directory,
        record: Callable[[], Announcement],
        period: float = PERIOD,
        lifetime: float = LIFETIME,
    ):
        self._directory = directory
        self._record = record
        self._period = period
        self._lifetime = lifetime
        self._due = asyncio.Event()
        self._failed = False
        self._stopped = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Announce from now on."""
        self._task = asyncio.create_task(self._run())

    def refresh(self) -> None:
        """Announce at once: the record has changed."""
        self._due.set()

    async def stop(self) -> None:
        """Stop, and withdraw the record if the swarm can be reached. May be called again."""
        task, self._task = self._task, None
        if task is None:
            return
        self._stopped = True  # hivemind may swallow a cancellation in the middle of storing a record
        task.cancel()
        await asyncio.wait({task}, timeout=WITHDRAW_TIMEOUT)
        try:
            await asyncio.wait_for(self._directory.withdraw(self._record()), WITHDRAW_TIMEOUT)
        except Exception as error:  # leaving must go on whatever happens
            _log.warning("This peer could not be withdrawn; its record will expire (%r).", error)

    async def _run(self) -> None:
        while not self._stopped:
            self._due.clear()
            problem = await self._announce()
            self._report(problem)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), min(self._period, RETRY) if problem else self._period)

    async def _announce(self) -> str:
        """Announce once; returns what went wrong, or nothing."""
        try:
            taken = await self._directory.announce(self._record(), self._lifetime)
        except Exception as error:  # the peer must stay announced whatever happens once
            return str(error) or type(error).__name__
        return "" if taken else "the DHT did not take the record; is this machine's clock right?"

    def _report(self, problem: str) -> None:
        if problem and not self._failed:
            _log.warning("Announcing this peer failed and will be tried again: %s", problem)
        elif self._failed and not problem:
            _log.warning("This peer is announced again.")
        self._failed = bool(problem)


def _parse(values: dict[str, Any], kind: type[R]) -> list[R]:
    """The valid records in a look-up's result; all else is left out."""
    records = []
    for peer_id, value in values.items():
        try:
            records.append(kind.from_bytes(value.value))
        except BadRequest as error:
            _log.debug("Ignored a record of peer %s: %s", peer_id, error)
    return records


def _current(values: dict[str, Any]) -> dict[str, Any]:
    now = time.time()
    return {peer_id: value for peer_id, value in values.items() if value.expiration_time > now}


def _peers(values: dict[str, Any]) -> list[PeerRecord]:
    records = [record for record in _parse(_current(values), PeerRecord) if record.state != PeerState.OFFLINE]
    return sorted(records, key=lambda record: (record.start, record.peer_id))


def _usual_model(records: Iterable[PeerRecord]) -> ModelId:
    """The model under the name that most peers give it: they may name it differently."""
    return Counter(record.model for record in records).most_common(1)[0][0]
