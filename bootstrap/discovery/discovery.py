"""Announces this member on every interface and looks for others of its swarm, as interfaces come and go."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from zeroconf import (
    DNSQuestionType,
    Error,
    InterfaceChoice,
    IPVersion,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

from bootstrap.addresses import ip_of, split_peer_address
from bootstrap.discovery.announcement import day_of, find_day, new_name, seal, unseal
from bootstrap.discovery.networks import Interface, is_near, own_interfaces
from protocol.membership.secret import SwarmSecret
from protocol.name import NAME

SERVICE = f"_{NAME}._tcp.local."
LOOK = 2.0
"""Seconds between two looks at this machine's interfaces."""
SETTLING = 6.0
"""Seconds after a change of interfaces in which others are asked for again: a new address is not of use at once."""
_CLOSE_TIMEOUT = 1.0
_TXT, _INTERNET = 16, 1
"""DNS's numbers of the record type and the class."""
_MAX_RECORDS = 16
_PART = 200
"""Bytes of what is announced in one string of a TXT record, which has 255 at most."""
_log = logging.getLogger(__name__)


class Discovery:
    """Looks for members on this machine's networks until `run` is cancelled."""

    def __init__(
        self,
        secret: SwarmSecret,
        own: Callable[[frozenset[Interface]], Sequence[str]],
        found: Callable[[list[str]], None],
    ):
        """`own`: this machine's interfaces -> where this member can be reached there, as full multiaddrs; none: it
        announces nothing. `found` is called with those of another member, all in networks that this machine is in.
        """
        self._secret, self._own, self._found = secret, own, found
        self._interfaces = frozenset[Interface]()
        self._announced: ServiceInfo | None = None
        self._announcing: asyncio.Future[object] | None = None
        """What has still to be said, as it is said several times."""
        self._content: tuple[int, tuple[str, ...]] = (0, ())
        """The day and the addresses that are announced."""
        self._browsers: list[AsyncServiceBrowser] = []
        self._quiet_from = 0.0

    async def run(self) -> None:
        """Until cancelled. A network on which this does not work is left out; nothing is raised."""
        logging.getLogger("zeroconf").setLevel(logging.ERROR)  # it warns of each interface that cannot multicast
        while True:
            try:
                await self._run()
            except (OSError, RuntimeError, Error) as error:  # no interface at all, or another holds the port
                _log.debug("no discovery for now: %r", error)
            await asyncio.sleep(LOOK)

    async def _run(self) -> None:
        self._interfaces = own_interfaces()
        multicast = AsyncZeroconf(InterfaceChoice.All, ip_version=_versions())
        try:
            while True:
                self._look(multicast.zeroconf)
                await self._announce(multicast)
                await asyncio.sleep(LOOK)
                interfaces = own_interfaces()
                if interfaces != self._interfaces:
                    self._interfaces, self._quiet_from = interfaces, time.monotonic() + SETTLING
                if time.monotonic() < self._quiet_from:
                    await multicast.async_update_interfaces()
                    await self._look_no_more()
        finally:
            self._say_no_more()
            self._content, self._announced = (0, ()), None
            with suppress(TimeoutError, OSError, Error):
                await asyncio.wait_for(multicast.async_close(), _CLOSE_TIMEOUT)
            self._browsers.clear()

    def _look(self, zeroconf: Zeroconf) -> None:
        """Ask who is there, now and ever more rarely, and listen.

        In both ways: what all hear (QM) is said once a second at most, and an answer to this machine alone (QU) reaches
        only one of its processes.
        """
        if not self._browsers:
            for kind in (DNSQuestionType.QU, DNSQuestionType.QM):
                self._browsers.append(AsyncServiceBrowser(zeroconf, SERVICE, [self._hear], question_type=kind))

    async def _look_no_more(self) -> None:
        while self._browsers:
            await self._browsers.pop().async_cancel()

    async def _announce(self, multicast: AsyncZeroconf) -> None:
        """Say where this member is now, under a new name if it is another day."""
        day, addresses = day_of(time.time()), tuple(self._own(self._interfaces))
        if (day, addresses) == self._content:
            return
        self._say_no_more()
        known, self._announced = self._announced, None
        if known is not None and (day != self._content[0] or not addresses):
            await (await multicast.async_unregister_service(known))
            known = None
        self._content = day, addresses
        if not addresses:
            return
        name = _label(known.name) if known is not None else new_name(self._secret, day)
        sealed = seal(self._secret, day, name, addresses)
        parts = {str(at // _PART): sealed[at : at + _PART] for at in range(0, len(sealed), _PART)}
        self._announced = ServiceInfo(
            SERVICE, f"{name}.{SERVICE}", port=0, properties=parts, server=f"{name}.local.", addresses=[]
        )
        if known is not None:
            said = await multicast.async_update_service(self._announced)
        else:  # nobody else has that name
            said = await multicast.async_register_service(self._announced, cooperating_responders=True)
        self._announcing = asyncio.ensure_future(said)

    def _say_no_more(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None

    def _hear(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """What is heard may be anyone's, and anything."""
        if state_change is ServiceStateChange.Removed or (self._announced is not None and name == self._announced.name):
            return
        day = find_day(self._secret, _label(name), day_of(time.time()))
        if day is None:
            return
        # Whoever likes can add records under a member's name: the newest one that is the swarm's counts.
        records = zeroconf.cache.get_all_by_details(name, _TXT, _INTERNET)
        for record in sorted(records, key=lambda record: -record.created)[:_MAX_RECORDS]:
            try:
                addresses = unseal(self._secret, day, _label(name), _join_parts(name, getattr(record, "text", b"")))
            except ValueError:
                continue
            near = [address for address in addresses if self._is_near(address)]
            if near:
                self._found(near)
            return

    def _is_near(self, address: str) -> bool:
        ip = ip_of(split_peer_address(address)[1])
        return ip is not None and is_near(ip, self._interfaces)


def _label(name: str) -> str:
    return name.removesuffix(f".{SERVICE}")


def _join_parts(name: str, text: bytes) -> bytes:
    """What the strings 0=..., 1=... of a TXT record say."""
    strings = ServiceInfo(SERVICE, name, properties=text).properties
    return b"".join(strings.get(str(part).encode()) or b"" for part in range(len(strings)))


def _versions() -> IPVersion:
    """Both where this machine has IPv6 at all."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return IPVersion.V4Only
    return IPVersion.All
