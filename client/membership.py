"""One membership, and so one p2pd process, for all models of this process that use the same swarm."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from bootstrap.member import Member, MemberOptions

_LINGER = 5.0
"""Seconds that an unused membership is kept, in case that the next model joins the same swarm."""


_Name = tuple[tuple[str, ...], Path | None]
"""Of a swarm: its initial peers, and the file with its key."""


@dataclass
class _Shared:
    member: Member
    users: int = 0


class Memberships:
    """The swarms that this process is a member of. Used on the loop only."""

    def __init__(self) -> None:
        self._shared: dict[_Name, _Shared] = {}
        self._joining = asyncio.Lock()

    async def acquire(self, initial_peers: tuple[str, ...], swarm_key: Path | None) -> Member:
        """Join, or share a membership that is there. Raises as `Member.join`."""
        name = (initial_peers, swarm_key.absolute() if swarm_key is not None else None)
        async with self._joining:
            shared = self._shared.get(name)
            if shared is None or shared.member.lost.is_set():
                options = MemberOptions(initial_peers=initial_peers, client_mode=True, swarm_key=swarm_key)
                shared = self._shared[name] = _Shared(await Member.join(options))
            shared.users += 1
            return shared.member

    def release(self, member: Member) -> None:
        """One user less; the last one's leaving ends the membership after a while."""
        for name, shared in self._shared.items():
            if shared.member is member:
                shared.users -= 1
                asyncio.get_running_loop().call_later(_LINGER, self._end_if_unused, name)

    async def close(self) -> None:
        """Leave every swarm."""
        for name in list(self._shared):
            await self._shared.pop(name).member.shutdown()

    def _end_if_unused(self, name: _Name) -> None:
        shared = self._shared.get(name)
        if shared is not None and not shared.users:
            del self._shared[name]
            self._ending = asyncio.create_task(shared.member.shutdown())
