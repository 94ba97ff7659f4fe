"""What a client knows of a swarm: who serves its model, by which route, and who failed of late."""

import asyncio
import logging
import time
import weakref
from collections.abc import Collection
from concurrent.futures import Future
from typing import Any, Literal

from client.swarm.config import SwarmConfig
from client.swarm.health import Health
from client.swarm.loop import LOOP, ProcessLoop
from client.swarm.membership import MEMBERSHIPS, Membership
from client.swarm.routes import Hop, check_row, find_route, spare_blocks
from protocol.connections import Connections
from protocol.errors import BadUsage, NoRoute, PeerUnreachable, SwarmError
from protocol.model.checkpoint import Checkpoint
from protocol.records import MAX_ACCUSED, Accusation, Complaint, ModelVersion, PeerRecord, holes

logger = logging.getLogger(__name__)

Purpose = Literal["decode", "forward"]
_EXPIRED = 60.0
"""Seconds after which what was looked up is of no use: peers announce themselves for as long."""
_INNOCENT = 5.0
"""Seconds before the end of our own p2pd was noticed in which peers seemed to fail."""


class Swarm:
    """A client's membership in a swarm, for one model and its copies. `connect` makes one, and the loop runs it."""

    def __init__(self, config: SwarmConfig, checkpoint: Checkpoint, membership: Membership):
        self.config, self.model_id = config, checkpoint.model_id
        self.loop = ProcessLoop()
        """What runs this membership's coroutines, and those of all that asks peers through it."""
        self.health = Health()
        wanted = ModelVersion(self.model_id, checkpoint.digests)
        self.connections = Connections(
            lambda: membership.member, wanted, config.silence_timeout, self.health.measured, config.carrier
        )
        self.sessions = membership.sessions
        self._membership = membership
        self._known: list[PeerRecord] = []
        self._complaints: dict[str, str] = {}
        self._looked_up = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._look_up = asyncio.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Swarm":
        return self

    def __reduce__(self) -> Any:
        raise BadUsage(
            "A model whose blocks run on a swarm cannot be pickled, nor go through torch.save; use save_pretrained."
        )

    @classmethod
    def connect(cls, config: SwarmConfig, checkpoint: Checkpoint, joining: Future[Membership]) -> "Swarm":
        """Once joined. Raises `BadUsage` for a malformed address, `PeerUnreachable`, `NotAMember`."""
        _check_pins(config, checkpoint)
        membership = joining.result()

        async def hold() -> Swarm:
            membership.users += 1
            return cls(config, checkpoint, membership)

        swarm = LOOP.run(hold())
        weakref.finalize(swarm, swarm.loop.call, _leave, swarm.connections, swarm._membership)
        return swarm

    async def find_route(
        self, start: int, end: int, purpose: Purpose, without: Collection[str] = (), row: int = 0
    ) -> list[Hop]:
        """The hops for blocks [start, end), not through the peers `without`, nor those that cannot train `row` tokens.

        Looks up the peers again when those that are known do not reach. Raises `NoRoute`, and `TooLong` where there are
        peers for all blocks, but none for such a row.
        """
        cost = self.health.decode_cost if purpose == "decode" else self.health.forward_cost
        try:
            return find_route(self._usable(await self.fetch_peers(), without, row), start, end, cost)
        except NoRoute:
            peers = await self.fetch_peers(fresh=True)
            if not peers and (others := await self._other_models()):
                raise NoRoute(
                    f"This swarm serves {others}, and not {self.model_id.name} as configured here; "
                    "use a model that it serves, or start peers for this one."
                ) from None
            check_row([peer for peer in peers if peer.state == "online"], start, end, row)
            return find_route(self._usable(peers, without, row), start, end, cost)

    async def _other_models(self) -> str:
        """The names of what the swarm serves, when this model is not among it."""
        models = await self._membership.member.directory.models()
        known = {model.config_hash: model.name for model in models}
        return "" if self.model_id.config_hash in known else ", ".join(sorted(known.values()))

    async def fetch_peers(self, fresh: bool = False) -> list[PeerRecord]:
        """The peers of this model that the configuration allows, as the directory has them now, or had them of late.

        What is older than `look_up_period` is looked up in the background: a member that has just fallen silent may be
        among those who are asked, and would hold up for many seconds the work that is going round it.
        """
        asked = time.monotonic()
        age = asked - self._looked_up
        if fresh or age > _EXPIRED or self._membership.is_lost:
            await self._refresh(asked)
        elif age > self.config.look_up_period and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._refresh_quietly(asked))
        return self._known

    async def _refresh(self, asked: float) -> None:
        async with self._look_up:
            if self._looked_up < asked:
                found = await self._look_peers_up()
                self._known = [peer for peer in found if self._allows(peer.peer_id)]
                self._looked_up = time.monotonic()

    async def _refresh_quietly(self, asked: float) -> None:
        try:
            await self._refresh(asked)
        except SwarmError as error:
            logger.debug("the directory could not be read: %s", error)

    async def _look_peers_up(self) -> list[PeerRecord]:
        try:
            return await self._membership.member.directory.peers(self.model_id.config_hash)
        except PeerUnreachable:
            if not self._membership.is_lost:
                raise
        await self._membership.renew(address for peer in self._known for address in peer.addresses)
        self.health.pardon(_INNOCENT)
        return await self._membership.member.directory.peers(self.model_id.config_hash)

    def may_recover(self, start: int, end: int) -> bool:
        """Whether blocks [start, end) lack nothing but peers that failed of late and are kept away from."""
        return not holes([peer for peer in self._known if peer.state == "online"], start, end)

    def blame(self, peer: PeerRecord, error: SwarmError) -> None:
        """Take note that `peer` failed with `error`: keep away from it for a while."""
        if self._membership.is_lost:  # it is our own p2pd that has failed
            self.connections.close()
            return
        logger.info("peer %s failed: %s", peer.name or peer.peer_id, error)
        self.connections.forget(peer.peer_id)
        self.health.ban(peer.peer_id, at_least=error.retry_after)

    def complain(self, peer: PeerRecord, kind: str) -> None:
        """Tell the swarm that `peer` answered wrongly, for `peer status` to show."""
        self._complaints[peer.peer_id] = kind
        self._complaining = asyncio.create_task(self._publish_complaints())

    async def _publish_complaints(self) -> None:
        accused = tuple(Accusation(peer_id=peer_id, kind=kind) for peer_id, kind in self._complaints.items())
        complaint = Complaint(
            peer_id=self._membership.member.peer_id, model=self.model_id, accused=accused[-MAX_ACCUSED:]
        )
        try:
            await self._membership.member.directory.complain(complaint)
        except SwarmError as error:
            logger.warning("the swarm could not be told of a peer that answers wrongly: %s", error)

    def keep_away(self, peer: PeerRecord) -> None:
        """A peer is leaving: no new work for it until the directory has heard of it, or of its return."""
        self.health.ban(peer.peer_id, at_least=self.config.look_up_period)

    def _usable(self, peers: list[PeerRecord], without: Collection[str], row: int) -> list[PeerRecord]:
        free = [
            peer
            for peer in peers
            if peer.state == "online" and peer.peer_id not in without and not self.health.is_banned(peer.peer_id)
            if peer.trains(row)
        ]
        for span, trusted in self.config.pins.items():
            start, end = map(int, span.split(":"))
            free = [part for peer in free for part in spare_blocks(peer, start, end, peer.peer_id in trusted)]
        return free

    def _allows(self, peer_id: str) -> bool:
        allowed = self.config.allowed_peers
        return peer_id not in self.config.blocked_peers and (allowed is None or peer_id in allowed)


def _check_pins(config: SwarmConfig, checkpoint: Checkpoint) -> None:
    total = checkpoint.model_id.num_blocks
    for span in config.pins:
        if int(span.partition(":")[2]) > total:
            raise BadUsage(f"Option pins of the swarm: {span!r} is out of range; the model has blocks 0:{total}.")


def _leave(connections: Connections, membership: Membership) -> None:
    connections.close()
    MEMBERSHIPS.release(membership)
