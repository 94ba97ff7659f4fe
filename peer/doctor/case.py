"""What is examined: this machine, as a member of the swarm that is meant."""

import asyncio
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import split_peer_address
from bootstrap.member import Member, MemberOptions
from peer.start.options import ServeOptions
from protocol.errors import BadUsage, ClocksDiffer, NotAMember, PeerUnreachable, SwarmError
from protocol.records import MemberRecord, ModelId, PeerRecord
from protocol.stream import Stream

_FINDING = 3.0
"""Seconds for members on the same network to be found."""


class Case:
    """A machine and its swarm. It joins when a check first asks for that, and leaves by `close`."""

    def __init__(self, membership: MemberOptions, serving: ServeOptions, model: str | None):
        """`membership`, `serving`, `model`: as `peer serve` on this machine would have them."""
        self.membership, self.serving, self.model = membership, serving, model
        self.problem: SwarmError | None = None
        """Why the swarm could not be joined, or nobody in it answers. Known after `join`."""
        self.seen_as = set[str]()
        """This machine's IP addresses, as other members see them."""
        self._member: Member | None = None
        self._folder: TemporaryDirectory[str] | None = None
        """For an identity of its own: the peer of this machine may be running."""
        self._is_tried = False
        self._models: dict[ModelId, list[PeerRecord]] | None = None
        self._members: list[MemberRecord] | None = None

    @property
    def names_swarm(self) -> bool:
        """Whether a swarm was named at all."""
        return bool(self.membership.initial_peers or self.membership.swarm)

    async def join(self) -> Member | None:
        """This machine as a member that listens; None: see `problem`."""
        if not self._is_tried:
            self._is_tried = True
            self._folder = TemporaryDirectory()
            options = replace(self.membership, identity_path=Path(self._folder.name, "identity"))
            try:
                self._member = member = await Member.join(options)
                await member.transport.serve(_hang_up)
            except SwarmError as error:
                self.problem = error
            else:
                if self.membership.swarm is not None and self.membership.swarm.discovery:
                    await _wait_for(lambda: bool(member.others))
                if not member.others:  # in a private swarm that is no failure to join
                    problems = [error for error in await member.find_others() if isinstance(error, SwarmError)]
                    self.problem = min(problems, key=_vagueness, default=None)
        return self._member

    async def others(self) -> list[str]:
        """The IDs of the members that answer."""
        member = await self.join()
        with suppress(PeerUnreachable):
            await self.models()  # to look them up is to meet more members than the join, which is brief, has time for
        return member.others if member is not None else []

    async def models(self) -> dict[ModelId, list[PeerRecord]]:
        """What is served in the swarm, by other processes than this one. Raises `PeerUnreachable`."""
        member = await self.join()
        if self._models is None:
            found = await member.directory.models() if member is not None and member.others else {}
            own = member.peer_id if member is not None else ""
            self._models = {model: [p for p in peers if p.peer_id != own] for model, peers in found.items()}
        return self._models

    async def members(self) -> list[MemberRecord]:
        """The other processes of a private swarm's members that are up. Raises `PeerUnreachable`."""
        member = await self.join()
        if self._members is None:
            is_private = member is not None and member.membership is not None and member.others
            found = await member.directory.members() if member is not None and is_private else []
            self._members = [one for one in found if member is not None and one.peer_id != member.peer_id]
        return self._members

    @property
    def named(self) -> list[str]:
        """Where members were named or seen before: full multiaddrs."""
        folder = self.membership.swarm
        seen = folder.addresses(without=[self._member.peer_id] if self._member else []) if folder is not None else ()
        return list(dict.fromkeys([*self.membership.initial_peers, *seen]))

    async def places(self) -> dict[str, list[Multiaddr]]:
        """Peer ID -> where a member that answers says that it is. Raises `PeerUnreachable`."""
        announced = [address for one in await self.members() for address in one.addresses]
        for peers in (await self.models()).values():
            announced += [address for peer in peers for address in peer.addresses]
        known, answering = _by_peer([*self.named, *announced]), set(await self.others())
        return {peer_id: places for peer_id, places in known.items() if peer_id in answering}

    async def close(self) -> None:
        """Leave the swarm."""
        if self._member is not None:
            await self._member.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


@cache
def own_hosts() -> frozenset[IPv4Address | IPv6Address]:
    """This machine's IP addresses, loopback among them."""
    found = set()
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                found.add(ip_address(entry.address.partition("%")[0]))
    return frozenset(found)


async def _wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _FINDING
    while not is_so() and time.monotonic() < deadline:
        await asyncio.sleep(0.1)


def _by_peer(addresses: list[str]) -> dict[str, list[Multiaddr]]:
    found: dict[PeerID, list[Multiaddr]] = defaultdict(list)
    for address in addresses:
        with suppress(BadUsage):
            peer_id, place = split_peer_address(address)
            if place not in found[peer_id]:
                found[peer_id].append(place)
    return {peer_id.to_base58(): places for peer_id, places in found.items() if places}


def _vagueness(problem: SwarmError) -> int:
    return not isinstance(problem, NotAMember | ClocksDiffer)


async def _hang_up(stream: Stream) -> None:
    """Who dials back wants nothing but a connection."""
