"""The other members that one knows: the first contact with them, and finding them again when they are lost."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from hivemind.dht import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import split_peer_address
from bootstrap.daemon import Connection
from bootstrap.membership.gate import Gate
from bootstrap.storage import RecordStorage
from protocol.errors import BadUsage, ClocksDiffer, NoSwarm, NotAMember, PeerUnreachable, SwarmError
from protocol.membership.refusals import Refusal

GRACE = 0.5
"""Seconds for the other initial peers once one has answered."""
_MAX_ADDRESSES, _MAX_INITIAL = 8, 64
"""Addresses of one member, and members, that are kept to be tried again."""
_ALONE_TIMEOUT = 3.0
"""Seconds that a member which may be alone waits for those that it knows before it begins; it goes on trying."""
_SEARCH, _ALONE_SEARCH = 4.0, 1.5
"""Seconds for others to be discovered where none is known that answers, and if this member may be alone. Multicast DNS
asks at once, after one second and after three."""
_SEARCH_TIMEOUT = 3.0
_REASON_TIMEOUT = 1.0
_CLOCK_TIMEOUT = 3.0
_log = logging.getLogger(__name__)


async def create_node(gate: Gate, validator: RecordValidatorBase, client_mode: bool) -> DHTNode:
    """A DHT node that keeps no cache and takes only the records that `validator` does."""
    node = await DHTNode.create(
        gate,
        # The ID follows from the identity, so that others' routing tables stay right after a restart.
        node_id=DHTID.generate(source=gate.peer_id.to_bytes()),
        client_mode=client_mode,
        record_validator=validator,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )
    node.protocol.storage = node.protocol.cache = RecordStorage()
    return node


class Neighbours:
    """The members that this one knows, first of all the `initial_peers` (full multiaddrs)."""

    def __init__(
        self,
        p2p: Connection,
        node: DHTNode,
        initial_peers: Iterable[str],
        known: Iterable[str] = (),
        may_be_alone: bool = False,
        searching: bool = False,
    ):
        """`known`: where others were last, as full multiaddrs. `may_be_alone`: it is no failure that nobody else is
        there yet. `searching`: `discovered` will be called with what is found.
        """
        self._p2p = p2p
        self._node = node
        self._may_be_alone, self._searching = may_be_alone, searching
        self.news = asyncio.Event()
        """Set when a member was met; for others to clear."""
        self._met = asyncio.Event()
        self._meetings: dict[PeerID, asyncio.Task[None]] = {}
        self._initial: dict[PeerID, list[Multiaddr]] = defaultdict(list)
        self.add(initial_peers)
        self._named = frozenset(self._initial)
        self.add(known)

    def add(self, addresses: Iterable[str]) -> None:
        """Take note of more members' full multiaddrs, to be tried when they are not known otherwise."""
        for address in addresses:
            with suppress(BadUsage):  # it is another member's word
                peer_id, where = split_peer_address(address)
                if peer_id == self._p2p.peer_id or not self._has_room(peer_id):
                    continue
                if where not in self._initial[peer_id]:
                    self._initial[peer_id] = [where, *self._initial[peer_id]][:_MAX_ADDRESSES]

    def _has_room(self, peer_id: PeerID) -> bool:
        """Whether `peer_id` may be kept; one that does not answer gives way."""
        if peer_id in self._initial or len(self._initial) < _MAX_INITIAL:
            return True
        lost = next((other for other in self._initial if other not in self._named and other not in self.known()), None)
        if lost is not None:
            del self._initial[lost]
        return lost is not None

    def discovered(self, addresses: list[str]) -> None:
        """Take note of members that are on this machine's networks now, and meet those that are not known yet."""
        self.add(addresses)
        for peer_id in {split_peer_address(address)[0] for address in addresses} & self._initial.keys() - self.known():
            if peer_id not in self._meetings:
                self._meetings[peer_id] = asyncio.create_task(self._meet_quietly(peer_id))

    async def _meet_quietly(self, peer_id: PeerID) -> None:
        try:
            await self._meet(peer_id)
        except SwarmError as error:
            _log.debug("%s was discovered, but does not answer: %s", peer_id, error)
        finally:
            del self._meetings[peer_id]

    @property
    def cut_off(self) -> bool:
        """Whether this member has lost its swarm. A founder may be alone."""
        return self._p2p.broken.is_set() or bool(self._initial and not self.known() and not self._may_be_alone)

    async def ensure(self) -> None:
        """Find the swarm again if it is lost. Raises `PeerUnreachable` or `NotAMember` when that fails."""
        if self._p2p.broken.is_set():
            raise PeerUnreachable("This process has left the swarm: its p2pd process is gone.")
        failures = await self.rejoin() if self.cut_off else []
        if self.cut_off:
            _raise_not_a_member(failures)
            raise PeerUnreachable(f"No member of the swarm answers any more, {self._names()} included.")

    async def join(self) -> None:
        """Meet the initial peers, or others, then the members nearest to us.

        Raises `NoSwarm` when nobody answers, unless this member may be alone, `NotAMember`.
        """
        if not self._initial and not self._searching:
            return
        tasks = {asyncio.create_task(self._meet(peer_id)): peer_id for peer_id in self._initial}
        try:
            async with asyncio.timeout(_ALONE_TIMEOUT if self._may_be_alone else None):
                met = await self._first_met(tasks)
        except TimeoutError:
            met = False
        finally:
            for task in tasks:
                task.cancel()
        failures = {
            tasks[task]: error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())
        }
        if not met:
            _raise_not_a_member(failures.values())
            if self._may_be_alone:
                _log.info("No other member answers yet%s", self._explain(failures))
                return
            is_clock = any(isinstance(error, ClocksDiffer) for error in failures.values())
            raise (ClocksDiffer if is_clock else NoSwarm)(self._nobody(failures))
        for peer_id, error in failures.items():
            level = logging.WARNING if peer_id in self._named else logging.DEBUG
            _log.log(level, "Initial peer %s does not answer: %s", peer_id, error)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._node.find_nearest_nodes([self._node.node_id]), _SEARCH_TIMEOUT)

    async def _first_met(self, tasks: Iterable[asyncio.Task[None]]) -> bool:
        """Wait until somebody is met and the others have had `GRACE` seconds; False when all failed."""
        pending: set[asyncio.Task[Any]] = {*tasks, (met := asyncio.create_task(self._met.wait()))}
        try:
            while pending - {met} and not met.done():
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            is_refused = any(isinstance(task.exception(), NotAMember) for task in tasks if task.done())
            if not met.done() and self._searching and not is_refused:
                await asyncio.wait({met}, timeout=_ALONE_SEARCH if self._may_be_alone else _SEARCH)
            if others := pending - {met}:
                await asyncio.wait(others, timeout=GRACE)
        finally:
            met.cancel()
        return self._met.is_set()

    async def rejoin(self) -> list[BaseException]:
        """Try those initial peers again that are not known any more: they may have been restarted.

        Returns why those that cannot be met cannot.
        """
        missing = [peer_id for peer_id in self._initial if peer_id not in self.known()]
        results = await asyncio.gather(*map(self._meet, missing), return_exceptions=True)
        return [result for result in results if result is not None]

    async def clock_difference(self, peer_id: PeerID) -> float:
        """Seconds that a member's clock is ahead of this machine's, known to half a round trip.

        Raises `PeerUnreachable`, and `ClocksDiffer` where a member of a private swarm does not answer for that.
        """
        begin = time.time()
        try:
            stub = self._node.protocol.get_stub(peer_id)
            answer = await stub.rpc_ping(dht_pb2.PingRequest(), timeout=_CLOCK_TIMEOUT)
        except SwarmError:
            raise
        except Exception as error:  # a broken connection, a timeout, or whatever the other end says
            raise PeerUnreachable(f"Peer {peer_id} does not say what time it is.") from error
        return float(answer.dht_time) - (begin + time.time()) / 2

    def describe(self) -> str:
        """How many members are known, and whether the swarm is lost: a line for people."""
        return f"{len(self.known())} other members known" + (", none of which answers" if self.cut_off else "")

    async def _meet(self, peer_id: PeerID) -> None:
        """Connect to an initial peer and exchange DHT IDs with it. Raises `PeerUnreachable`, `NotAMember`."""
        try:
            await self._p2p.dial(peer_id, self._initial[peer_id])
            dht_id = await self._node.protocol.call_ping(peer_id, validate=True, strict=True)
        except ValidationError as error:
            raise _refusal(str(error)) from error
        except (P2PDaemonError, OSError, EOFError) as error:
            raise PeerUnreachable(_shorten(str(error))) from error
        if dht_id is None:
            raise await self._find_reason(peer_id)
        # The ping updates the routing table later, but `cut_off` must see this member now.
        await self._node.protocol.update_routing_table(dht_id, peer_id)
        self._node.blacklist.register_success(peer_id)
        self._met.set()
        self.news.set()

    async def _find_reason(self, peer_id: PeerID) -> SwarmError:
        """The error that says why a peer did not answer a ping: hivemind gives no reason."""
        try:
            stub = self._node.protocol.get_stub(peer_id)
            await stub.rpc_ping(dht_pb2.PingRequest(), timeout=_REASON_TIMEOUT)
        except SwarmError as error:
            return error
        except Exception as error:  # a broken connection, a timeout, or whatever the other end says
            _log.debug("peer %s does not answer: %r", peer_id, error)
        return PeerUnreachable("it is no member of a swarm, or too slow")

    def known(self) -> set[PeerID]:
        """The members that answered of late."""
        return set(self._node.protocol.routing_table.peer_id_to_uid)

    def met(self) -> dict[str, tuple[str, ...]]:
        """Peer ID -> full multiaddrs, of the members that answered of late at an address that was named or found."""
        known = self.known()
        return {
            str(peer_id): tuple(f"{place}/p2p/{peer_id}" for place in places)
            for peer_id, places in self._initial.items()
            if peer_id in known
        }

    def _names(self) -> str:
        return ", ".join(f"{address}/p2p/{peer_id}" for peer_id in self._initial for address in self._initial[peer_id])

    def _nobody(self, failures: dict[PeerID, BaseException]) -> str:
        if not self._searching:
            return f"None of the initial peers answers{self._explain(failures)}"
        return (
            "No other member of the swarm was found on this machine's networks, and none is known that answers"
            f"{self._explain(failures)} Start one (`peer serve`, `peer bootstrap`); where multicast does not reach, as "
            "behind a router, name the address of one with --initial-peers."
        )

    def _explain(self, failures: dict[PeerID, BaseException]) -> str:
        """The end of a sentence: which addresses were tried, and why none of them is of use."""
        reasons = [
            f"{address}/p2p/{peer_id} ({failures.get(peer_id, 'no answer in time')})"
            for peer_id in self._initial
            for address in self._initial[peer_id]
        ]
        return f": {'; '.join(reasons)}." if reasons else "."


def _raise_not_a_member(failures: Iterable[BaseException]) -> None:
    """Raise the `NotAMember` among `failures`, if there is one: it tells more than that nobody answers."""
    for error in failures:
        if isinstance(error, NotAMember):
            raise error


def _refusal(message: str) -> SwarmError:
    if "local time" in message:
        return Refusal.CLOCKS_DIFFER.error()
    return PeerUnreachable("it cannot reach this machine in return")


def _shorten(message: str) -> str:
    """The last line of a libp2p error, which is the cause."""
    lines = [line.strip(" *") for line in message.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no connection"
