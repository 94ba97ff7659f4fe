"""One membership, and so one p2pd process, for all models of this process that use the same swarm."""

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from bootstrap.member import Member, MemberOptions
from bootstrap.membership.folder import SwarmFolder
from bootstrap.options import find_swarm
from client.swarm.config import SwarmConfig
from client.swarm.loop import LOOP
from client.swarm.sessions import OpenSessions

_LINGER = 5.0
"""Seconds that an unused membership is kept, in case that the next model joins the same swarm."""
_MAX_ADDRESSES = 20
logger = logging.getLogger(__name__)


class Membership:
    """One swarm that this process is a member of; joined anew when its p2pd process dies. Used on the loop only."""

    def __init__(self, initial_peers: tuple[str, ...], swarm: SwarmFolder | None, member: Member):
        self.member, self.users = member, 0
        self.sessions = OpenSessions()
        self._initial_peers, self._swarm = initial_peers, swarm
        self._joining = asyncio.Lock()

    @classmethod
    async def begin(cls, initial_peers: tuple[str, ...], swarm: SwarmFolder | None) -> "Membership":
        """Join. Raises as `Member.join`."""
        return cls(initial_peers, swarm, await _join(initial_peers, swarm))

    @property
    def swarm(self) -> SwarmFolder | None:
        """The private swarm; None: an open one."""
        return self._swarm

    @property
    def is_lost(self) -> bool:
        """Whether p2pd has died: no connection lives any more, and none can be made."""
        return self.member.lost.is_set()

    async def renew(self, addresses: Iterable[str]) -> None:
        """Join again if this is lost, by way of the initial peers or any of `addresses`. Raises as `Member.join`."""
        async with self._joining:
            if self.is_lost:
                logger.warning("joining the swarm again")
                await self.member.shutdown()
                others = [address for address in addresses if address not in self._initial_peers]
                self.member = await _join((*self._initial_peers, *others[:_MAX_ADDRESSES]), self._swarm)


class Memberships:
    """The swarms that this process is a member of. Used on the loop only."""

    def __init__(self) -> None:
        self._shared: dict[tuple[tuple[str, ...], Path | None], Membership] = {}
        """By initial peers and the private swarm's folder."""
        self._joining = asyncio.Lock()
        self._inherited = list[Membership]()
        """The parent's, in a fork. Kept: their end would be that of the parent's p2pd."""
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """A fork is a member of nothing yet."""
        self._inherited += self._shared.values()
        self._shared, self._joining = {}, asyncio.Lock()

    async def acquire(self, initial_peers: tuple[str, ...], swarm: SwarmFolder | None) -> Membership:
        """Join, or share a membership that is there. Raises as `Member.join`."""
        name = (initial_peers, swarm.path.absolute() if swarm is not None else None)
        async with self._joining:
            if name not in self._shared:
                self._shared[name] = await Membership.begin(initial_peers, swarm)
            membership = self._shared[name]
            await membership.renew(())
            membership.users += 1
            return membership

    def release(self, membership: Membership) -> None:
        """One user less; the last one's leaving ends the membership after a while."""
        membership.users -= 1
        asyncio.get_running_loop().call_later(_LINGER, self._end_if_unused, membership)

    async def close(self) -> None:
        """Leave every swarm."""
        for name in list(self._shared):
            await self._shared.pop(name).member.shutdown()

    def _end_if_unused(self, membership: Membership) -> None:
        if membership.users:
            return
        for name in [name for name, shared in self._shared.items() if shared is membership]:
            del self._shared[name]
            self._ending = asyncio.create_task(membership.member.shutdown())


MEMBERSHIPS = Memberships()
LOOP.at_exit(MEMBERSHIPS.close)


@contextmanager
def joining(config: SwarmConfig) -> Iterator[Future[Membership]]:
    """A membership that begins in the background, to be held by others (`users`) before the block ends.

    Raises `BadUsage` when it is not clear which swarm is meant; the result raises as `Member.join`. What is imported
    and read within the block takes this process's time, and a join p2pd's.
    """
    initial_peers, swarm = find_swarm(config.swarm, config.initial_peers, config.discovery)
    future = LOOP.start(MEMBERSHIPS.acquire(initial_peers, swarm))
    try:
        yield future
    finally:
        future.cancel()
        future.add_done_callback(_release)


def _release(joined: Future[Membership]) -> None:
    if not joined.cancelled() and joined.exception() is None:
        LOOP.call(MEMBERSHIPS.release, joined.result())


async def _join(initial_peers: tuple[str, ...], swarm: SwarmFolder | None) -> Member:
    return await Member.join(MemberOptions(initial_peers=initial_peers, client_mode=True, swarm=swarm))
