"""A member of a swarm: p2pd, DHT node, directory and transport under one life."""

import asyncio
import functools
import ipaddress
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Self

from hivemind.dht import DHTNode
from hivemind.p2p import P2PContext, P2PDaemonError, PeerID
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import (
    check_announced,
    for_others,
    ip_of,
    is_loopback,
    listening_addresses,
    own_ports,
    parts_of,
    split_peer_address,
)
from bootstrap.daemon import Connection, Daemon, DaemonFailed
from bootstrap.directory import Directory
from bootstrap.discovery.discovery import Discovery
from bootstrap.discovery.networks import Interface
from bootstrap.door import OwnDoor
from bootstrap.identity import Identity, signer_of
from bootstrap.membership.desk import Desk
from bootstrap.membership.folder import Known, SwarmFolder
from bootstrap.membership.gate import Bytes, Gate
from bootstrap.membership.own import OwnMembership
from bootstrap.membership.rounds import Rounds
from bootstrap.neighbours import Neighbours, create_node
from bootstrap.ports import ANY, bind
from bootstrap.validator import SignedRecords
from protocol.errors import BadRequest, BadUsage, NoSwarm, PeerFailed, PeerUnreachable, SwarmError, first_line
from protocol.membership.certificate import Role
from protocol.membership.handshake import Handshake
from protocol.name import installed_version
from protocol.records import MAX_ADDRESSES, Door, MemberRecord
from protocol.transport import dial_back
from protocol.transport.carriers import Carriers
from protocol.transport.dial_back import DialBack
from protocol.transport.direct import DirectCaller
from protocol.transport.introduction import Credentials
from protocol.transport.libp2p import LibP2PTransport

JOIN_TIMEOUT = 12.0
"""Seconds for the whole of `Member.join`."""
START_TIMEOUT = 10.0
"""Seconds of it for p2pd's start."""
UPKEEP_PERIOD = 10.0
"""Seconds between two looks at our own addresses and at lost initial peers."""
SEEN_PERIOD = 20.0
"""Seconds between two times that a member says in a private swarm that it is up, and looks who else is."""
_DIAL_BACK_TIMEOUT = 15.0
_LEAVE_TIMEOUT = 0.5
_MAX_KNOWN = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemberOptions:
    """How to take part in a swarm."""

    initial_peers: tuple[str, ...] = ()
    """Full multiaddrs (with /p2p/ID) of members; none: found a swarm."""
    host: str = ANY
    """The IP address to listen on, or `ANY`: all of this machine's, IPv4 and IPv6."""
    port: int = 0
    """The TCP port to listen on; 0: any free one."""
    announce_addresses: tuple[str, ...] = ()
    """Multiaddrs under which others reach this member, instead of those it sees itself."""
    identity_path: Path | None = None
    """An identity file, made if there is none; None: a new identity that is forgotten."""
    direct_port: int | None = None
    """The TCP port to listen on for direct connections; 0: any free one; None: no direct connections."""
    announce_direct: tuple[str, ...] = ()
    """Addresses (/ip4/…/tcp/…) for direct connections to announce, instead of this machine's own."""
    client_mode: bool = False
    """Listen nowhere and serve no DHT queries."""
    swarm: SwarmFolder | None = None
    """The private swarm that this machine is a member of; None: the swarm is open. What it knows of other members'
    addresses is used beside `initial_peers`, and its identity and port where none are given."""
    role: Role = Role.USE
    """The least role in a private swarm that this process needs."""


class Member:
    """A running member; made by `join`."""

    def __init__(
        self,
        identity: Identity,
        membership: OwnMembership | None,
        daemon: Daemon,
        p2p: Connection,
        node: DHTNode,
        neighbours: Neighbours,
        own_door: OwnDoor | None,
    ):
        self.peer_id: str = identity.peer_id
        self._identity = identity
        self.membership = membership
        """In a private swarm; None in an open one."""
        self.handshake = Handshake(self.peer_id, membership)
        """What every stream begins with."""
        self.addresses: list[str] = []
        """Full multiaddrs that others can join with; kept up to date. Empty for a client."""
        self.door: Door | None = None
        """Where others can connect directly; kept up to date."""
        self._own_door = own_door
        self.ports: dict[int, int] = {}
        """IP version -> the TCP port that p2pd listens on."""
        caller = DirectCaller(_credentials(identity))
        self.transport = Carriers(LibP2PTransport(p2p), caller, own_door.listener if own_door else None)
        self.directory = Directory(node, neighbours, self.transport.learn)
        self.lost = asyncio.Event()
        """Set when p2pd has died: open direct streams still work, all else fails at once. Not set by `shutdown`."""
        self.daemon_process_id = daemon.process_id
        self._daemon = daemon
        self._p2p = p2p
        self._dial_back = DialBack(self._hosts, caller)
        self._node = node
        self._neighbours = neighbours
        self.rounds: Rounds | None = None
        """With the other members of a private swarm."""
        self._resources = AsyncExitStack()
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def join(cls, options: MemberOptions) -> Self:
        """Join the swarm of `options.initial_peers`, or `options.swarm`, or found one.

        Raises `BadUsage` for options that cannot be right, `NoSwarm` when no initial peer answers in time, `NotAMember`
        when they are in another swarm, or this machine is out of theirs, `NotAllowed` when its role is too low,
        `PeerFailed` when p2pd cannot be started. Leaves nothing behind when it fails or is cancelled.
        """
        for address in options.initial_peers:
            split_peer_address(address)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT), AsyncExitStack() as resources:
                member = await cls._start(options, resources)
                member._resources = resources.pop_all()
                return member
        except TimeoutError as error:
            if options.swarm is not None and options.client_mode:
                raise NoSwarm(
                    f"No member of the swarm {options.swarm.name} answers within {JOIN_TIMEOUT:g} s, at the addresses "
                    "where they were seen last or on this network."
                ) from error
            if not options.initial_peers:
                raise PeerFailed(f"p2pd has started, but does not answer within {JOIN_TIMEOUT:g} s.") from error
            peers = ", ".join(options.initial_peers)
            raise NoSwarm(f"None of the initial peers answers within {JOIN_TIMEOUT:g} s: {peers}.") from error

    @classmethod
    async def _start(cls, options: MemberOptions, resources: AsyncExitStack) -> Self:
        quiet_hivemind()
        identity = _load_identity(options)
        resources.callback(identity.close)
        membership = OwnMembership(options.swarm, identity.peer_id) if options.swarm is not None else None
        if membership is not None:
            membership.check_own(options.role)
            options = _with_last_port(options, membership)
        known = _last_addresses(options, membership)
        # Any member may be a relay.
        daemon = await start_daemon(replace(options, initial_peers=(*options.initial_peers, *known)), identity)
        resources.push_async_callback(daemon.stop)
        own_door = None
        if options.direct_port is not None:
            own_door = OwnDoor(_credentials(identity), options.host, options.direct_port, options.announce_direct)
            resources.callback(own_door.listener.close)
        if identity.is_temporary:
            # p2pd has read the key; nothing may be left of it if this process is killed.
            identity.close()
        p2p = await Connection.open(daemon.control)
        resources.push_async_callback(p2p.shutdown)
        gate = Gate(p2p, membership)
        node = await create_node(gate, SignedRecords(identity, membership), options.client_mode)
        may_be_alone, searching = membership is not None and not options.client_mode, _may_search(options)
        neighbours = Neighbours(p2p, node, options.initial_peers, known, may_be_alone, searching)
        member = cls(identity, membership, daemon, p2p, node, neighbours, own_door)
        if not options.client_mode:
            await gate.add_protobuf_handler(dial_back.METHOD, member._answer_dial_back, Bytes)
            await member._refresh_addresses()
        if membership is not None and searching:
            own = functools.partial(member._reached_at, options.host)
            discovery = Discovery(membership.secret, own, neighbours.discovered)
            resources.push_async_callback(_cancel, asyncio.create_task(discovery.run()))
        await neighbours.join()
        tasks = [member._watch(), member._keep_up(listens=not options.client_mode)]
        if membership is not None:
            tasks += await member._take_part(membership, gate, listens=not options.client_mode)
        for task in tasks:
            resources.callback(asyncio.create_task(task).cancel)
        return member

    @property
    def others(self) -> list[str]:
        """The IDs of the members that answered of late."""
        return sorted(peer_id.to_base58() for peer_id in self._neighbours.known())

    async def find_others(self) -> list[BaseException]:
        """Try again those that were named or seen before and are not known now; why they cannot be met."""
        return await self._neighbours.rejoin()

    async def clock_difference(self, peer_id: str) -> float:
        """See `Neighbours.clock_difference`."""
        return await self._neighbours.clock_difference(PeerID.from_base58(peer_id))

    async def ask_to_dial_back(self, peer_id: str, addresses: Iterable[Multiaddr]) -> dial_back.Answer:
        """Have another member dial this machine's ports, for one IP version.

        It is asked by a p2pd of its own, which knows no other way to it than `addresses` (without /p2p), all of one IP
        version. For a member that listens and has an identity file. Raises `PeerUnreachable` when the other cannot be
        met there or does not answer, `NotAMember`, `PeerFailed`.
        """
        places, target = list(addresses), PeerID.from_base58(peer_id)
        door = self._own_door.listener if self._own_door is not None else None
        question = dial_back.Question(
            port=self.ports[6 if "ip6" in parts_of(places[0]) else 4],
            door=door.port if door else None,
            fingerprint=door.fingerprint if door else None,
        )
        try:
            async with asyncio.timeout(_DIAL_BACK_TIMEOUT), AsyncExitStack() as resources:
                daemon = await start_daemon(MemberOptions(client_mode=True), self._identity)
                resources.push_async_callback(daemon.stop)
                p2p = await Connection.open(daemon.control)
                resources.push_async_callback(p2p.shutdown)
                await p2p.dial(target, places)
                gate = Gate(p2p, self.membership)
                asked = Bytes(question.to_bytes())
                return dial_back.Answer.from_bytes(
                    await gate.call_protobuf_handler(target, dial_back.METHOD, asked, Bytes)
                )
        except (P2PDaemonError, OSError, EOFError, TimeoutError, BadRequest, PeerFailed) as error:
            raise PeerUnreachable(f"Peer {peer_id} does not dial back ({first_line(error)}).") from error

    async def _answer_dial_back(self, data: Bytes, context: P2PContext) -> Bytes:
        return Bytes(await self._dial_back.answer(context.remote_id.to_base58(), data))

    async def _hosts(self, peer_id: str) -> set[IPv4Address | IPv6Address]:
        """Where a peer's connections to this one come from; a relay is no such place."""
        ends = await self._p2p.connections(PeerID.from_base58(peer_id))
        return {ip for end in ends if "p2p-circuit" not in parts_of(end) and (ip := ip_of(end)) is not None}

    def describe(self) -> Iterator[str]:
        """How this member stands with its swarm now, a line each: for people."""
        yield f"member {self.peer_id}, p2pd is process {self.daemon_process_id}"
        yield from (f"    reached at {address}" for address in self.addresses)
        yield self._neighbours.describe()

    async def shutdown(self) -> None:
        """Leave the swarm: pending calls fail, p2pd ends, its files go. May be called again."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        with suppress(Exception):
            await asyncio.wait_for(self._node.shutdown(), _LEAVE_TIMEOUT)
        self._p2p.broken.set()
        if not self.lost.is_set():  # else open direct streams still work
            self.transport.hang_up()
        await self._resources.aclose()

    async def _watch(self) -> None:
        await self._daemon.gone.wait()
        self._p2p.broken.set()
        self.lost.set()
        _log.error("The p2pd process has died; this member has lost its swarm.")

    async def _keep_up(self, listens: bool) -> None:
        while True:
            await asyncio.sleep(UPKEEP_PERIOD)
            try:
                await self._neighbours.rejoin()
                if listens:
                    await self._refresh_addresses()
            except (OSError, EOFError, P2PDaemonError) as error:
                _log.debug("p2pd did not answer: %r", error)

    async def _take_part(self, membership: OwnMembership, gate: Gate, listens: bool) -> list[Coroutine[Any, Any, None]]:
        """What a private swarm takes besides: the coroutines that are to run as long as this member lives."""
        self.rounds = Rounds(membership, gate, self._neighbours.known)
        membership.changed.append(self.handshake.enforce)
        desk = Desk(membership, self.rounds, lambda: self.addresses)
        self._remember_met(membership.folder)
        if listens:
            await desk.open(self._p2p, gate)
            self._remember(membership, {})
        return [self.rounds.run(), self._be_seen(membership)]

    async def _be_seen(self, membership: OwnMembership) -> None:
        """Announce this process to the other members, and write down where they are."""
        while True:
            record = MemberRecord(
                peer_id=self.peer_id,
                member=membership.member.id,
                addresses=tuple(self.addresses)[:MAX_ADDRESSES],
                version=installed_version(),
            )
            try:
                await self.directory.announce_member(record)
                await self.look_around()
            except (SwarmError, OSError) as error:
                _log.debug("the members could not be looked up: %s", error)
            self._neighbours.news.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._neighbours.news.wait(), SEEN_PERIOD)

    async def look_around(self) -> None:
        """Write down which members of a private swarm are up, and where. Raises `PeerUnreachable`."""
        if self.membership is not None:
            seen = {one.peer_id: one for one in await self.directory.members()}
            self._remember(self.membership, seen)
            self._neighbours.add(address for one in seen.values() for address in one.addresses)

    def _save_port(self, folder: SwarmFolder) -> None:
        """Only the process with the swarm's own identity: at its address others will look for that again."""
        port = int(parts_of(split_peer_address(self.addresses[0])[1]).get("tcp", 0))
        if self._identity.path == folder.identity_path and port != folder.port:
            folder.save_port(port)

    def _remember(self, membership: OwnMembership, seen: Mapping[str, MemberRecord]) -> None:
        now = time.time()
        known = {
            peer_id: Known(member=one.member, seen=now, version=one.version, addresses=one.addresses)
            for peer_id, one in seen.items()
        }
        if self.addresses:
            known[self.peer_id] = Known(
                member=membership.member.id, seen=now, version=installed_version(), addresses=tuple(self.addresses)
            )
        membership.folder.remember(known)

    def _remember_met(self, folder: SwarmFolder) -> None:
        """Write down by which members this one came in, if that is new: a short command learns no more of them."""
        known, now = folder.known, time.time()
        news = {}
        for peer_id, addresses in self._neighbours.met().items():
            before = known.get(peer_id, Known(member="", seen=now, version=""))
            if not set(addresses) <= set(before.addresses):
                news[peer_id] = before.model_copy(update={"seen": now, "addresses": addresses})
        if news:
            folder.remember(news)

    def _reached_at(self, host: str, interfaces: Iterable[Interface]) -> list[str]:
        """Where others in this machine's networks reach this member: full multiaddrs, IPv4 first."""
        everywhere = host == ANY or ipaddress.ip_address(host).is_unspecified
        return [
            f"/ip{one.version}/{one.ip}/tcp/{self.ports[one.version]}/p2p/{self.peer_id}"
            for one in sorted(interfaces, key=lambda one: (one.version, one.ip))
            if one.version in self.ports and (everywhere or str(one.ip) == host)
        ]

    async def _refresh_addresses(self) -> None:
        visible = await self._p2p.visible_addresses()
        self.addresses = for_others(visible, self.peer_id)
        self.ports |= own_ports(visible)
        if self.membership is not None and self.addresses:
            self._save_port(self.membership.folder)
        if self._own_door is not None:
            self.door = self._own_door.describe(self.addresses)


def quiet_hivemind() -> None:
    """Hand hivemind's log messages, warnings and worse, to the program's own logging; it has a handler of its own."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.WARNING)
    logging.addLevelName(logging.WARNING, "WARNING")


def _load_identity(options: MemberOptions) -> Identity:
    """The one that was asked for; else the swarm's, if this process listens and no other uses it; else a new one."""
    if options.identity_path is None and options.swarm is not None and not options.client_mode:
        try:
            return Identity.load_or_create(options.swarm.identity_path)
        except BadUsage as error:
            _log.info("%s This process takes another identity.", error)
    return Identity.load_or_create(options.identity_path)


def _last_addresses(options: MemberOptions, membership: OwnMembership | None) -> tuple[str, ...]:
    """Where the other members were last. Raises `NoSwarm` where there is no way to any of them."""
    if membership is None:
        return ()
    known = membership.folder.addresses(without=[membership.peer_id])[:_MAX_KNOWN]
    if options.client_mode and not (known or options.initial_peers or _may_search(options)):
        raise NoSwarm(
            f"No other member of the swarm {membership.folder.name} has been seen yet; start one (`peer serve` or "
            "`peer bootstrap`), or give the address of one with --initial-peers."
        )
    return known


def _may_search(options: MemberOptions) -> bool:
    """Whether to look for members on this machine's networks."""
    is_near_others = options.client_mode or not is_loopback(options.host)
    return options.swarm is not None and options.swarm.discovery and is_near_others


def _with_last_port(options: MemberOptions, membership: OwnMembership) -> MemberOptions:
    """With the port where this machine listened last, if none is wanted."""
    if options.client_mode or options.port:
        return options
    return replace(options, port=_free_port(options.host, membership.folder.port))


async def _cancel(task: asyncio.Task[None]) -> None:
    """End a task, and wait until it has."""
    task.cancel()
    await asyncio.wait({task})


def _free_port(host: str, port: int) -> int:
    """`port`, or 0 when another process listens there."""
    try:
        bind(host, port, v6_only=True).close()
    except (BadUsage, ValueError):
        return 0
    return port


def _credentials(identity: Identity) -> Credentials:
    return Credentials(identity.peer_id, identity.public_key, identity.sign, signer_of)


async def start_daemon(options: MemberOptions, identity: Identity) -> Daemon:
    """A running p2pd. Raises `BadUsage` for options that cannot be right, `PeerFailed`."""
    arguments = [
        f"-id={identity.path}",
        "-relay=1",  # reach peers through relays
        "-connManager=1",
        *(_client_arguments() if options.client_mode else _listening_arguments(options, identity.peer_id)),
    ]
    if options.port and not options.client_mode:
        # p2pd shares its port with others that share it, and half of the connections would reach the wrong member. With
        # host ::, p2pd leaves the IPv4 port alone.
        bind(options.host, options.port, v6_only=True).close()
    try:
        return await Daemon.start(arguments, START_TIMEOUT)
    except DaemonFailed as error:
        if "listen" in str(error) and not options.client_mode:
            raise BadUsage(f"Cannot listen on {options.host}, port {options.port}: {error}.") from error
        raise PeerFailed(f"p2pd did not start: {error}.") from error


def _client_arguments() -> list[str]:
    return ["-dhtClient=1", "-noListenAddrs=1", "-autonat=0", "-natPortMap=0", "-relayService=0"]


def _listening_arguments(options: MemberOptions, peer_id: str) -> list[str]:
    port = options.port
    if options.host == ANY and not port:  # the same for IPv4 and IPv6, so that one can be told from the other
        with bind(ANY, 0) as free:
            port = free.getsockname()[1]
    arguments = [
        "-dhtServer=1",
        "-autonat=1",
        f"-hostAddrs={','.join(listening_addresses(options.host, port))}",
        f"-natPortMap={int(not is_loopback(options.host))}",
    ]
    if len(options.announce_addresses) > MAX_ADDRESSES:
        raise BadUsage(
            f"{len(options.announce_addresses)} addresses to announce are too many; give {MAX_ADDRESSES} at most."
        )
    if options.announce_addresses:
        announced = [check_announced(address, peer_id) for address in options.announce_addresses]
        arguments.append(f"-announceAddrs={','.join(announced)}")
    if options.initial_peers:
        # Behind a NAT, be reachable through relays. Without these names p2pd would ask the public IPFS network.
        arguments += ["-autoRelay=1", f"-trustedRelays={','.join(options.initial_peers)}"]
    return arguments
