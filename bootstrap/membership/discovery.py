"""Finding members on the same network with nothing configured: DNS-SD (RFC 6763), on every interface, IPv4 and IPv6.

What is broadcast tells an outsider nothing but that some swarm exists: a service with a random name, a port and
addresses, a fingerprint made with the swarm's secret and the day, and the peer ID, masked so that only members can read
it. Whoever is found must prove that it is a member, like anybody at any address. Only addresses on a network that this
machine is on are tried, whatever somebody broadcasts.
"""

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import base58
import psutil
from hivemind.utils.multiaddr import Multiaddr
from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from protocol.membership.secret import SwarmSecret
from protocol.name import NAME

SERVICE = f"_{NAME}._tcp.local."
LOOK = 2.0
"""Seconds between two looks at this machine's interfaces, the day, and what is to be broadcast."""
_RESOLVE_TIMEOUT = 3000
"""Milliseconds."""
_DAY = 86_400
_MULTIHASH = b"\x12\x20"
logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # it tells of every interface that carries no multicast


class Discovery:
    """Says on this machine's networks that a process is there, and hears of others."""

    def __init__(self, secret: SwarmSecret, peer_id: str, found: Callable[[list[str]], None]):
        """`found` is called with the full multiaddrs of a process of the same swarm, for each that is heard of."""
        self._secret, self._peer_id, self._found = secret, peer_id, found
        self._tasks = set[asyncio.Task[None]]()

    async def run(self, addresses: Callable[[], Sequence[str]], until: Callable[[], bool]) -> None:
        """Until `until` says so. `addresses`: this process's own; none: it only listens. Raises `OSError`."""
        network = _open()
        browser, said, seen = self._browse(network), None, _interfaces()
        try:
            while not until():
                if (now := _interfaces()) != seen:
                    seen = now
                    await network.async_update_interfaces()
                    await browser.async_cancel()
                    browser = self._browse(network)  # it asks anew, on the new interface too
                wanted = self._describe(addresses())
                if wanted is not None and (said is None or _content(said) != _content(wanted)):
                    if said is not None:
                        await network.async_unregister_service(said)
                    await network.async_register_service(wanted, cooperating_responders=True)
                    said = wanted
                await asyncio.sleep(LOOK if addresses() else 0.2)
        finally:
            for task in self._tasks:
                task.cancel()
            with suppress(Exception):  # nothing that goes wrong here matters any more
                await network.async_close()

    def _browse(self, network: AsyncZeroconf) -> AsyncServiceBrowser:
        return AsyncServiceBrowser(network.zeroconf, SERVICE, handlers=[self._hear])

    def _hear(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed:
            task = asyncio.create_task(self._look_at(zeroconf, name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look_at(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE, name)
        if await info.async_request(zeroconf, _RESOLVE_TIMEOUT) and (found := self.read(info)):
            self._found(found)

    def read(self, info: AsyncServiceInfo) -> list[str]:
        """The addresses of a process of the same swarm; none for any other, and for ourselves. Nothing is trusted."""
        fingerprint, masked = (info.properties.get(key) or b"" for key in (b"f", b"i"))
        today = int(time.time() // _DAY)
        for day in (today, today - 1, today + 1):  # clocks differ, and what was said is kept
            if fingerprint == self._fingerprint(day):
                peer_id = _to_peer_id(_xor(_from_hex(masked), self._mask(day, info.name)))
                break
        else:
            return []
        if peer_id == self._peer_id or not info.port:
            return []
        return [
            f"/ip{ip.version}/{ip}/tcp/{info.port}/p2p/{peer_id}"
            for ip in info.ip_addresses_by_version(IPVersion.All)
            if not ip.is_link_local and _is_near(ip)
        ]

    def _describe(self, addresses: Sequence[str]) -> AsyncServiceInfo | None:
        """What is to be broadcast of this process; None: nothing."""
        places = _places(addresses)
        if not places:
            return None
        port = places[0][1]
        name, day = f"{secrets.token_hex(8)}.{SERVICE}", int(time.time() // _DAY)
        masked = _xor(base58.b58decode(self._peer_id)[len(_MULTIHASH) :], self._mask(day, name))
        return AsyncServiceInfo(
            SERVICE,
            name,
            port=port,
            properties={"f": self._fingerprint(day), "i": masked.hex().encode()},
            server=f"{secrets.token_hex(8)}.local.",
            parsed_addresses=[host for host, number in places if number == port],
        )

    def _fingerprint(self, day: int) -> bytes:
        return self._secret.mac("discovery swarm", str(day).encode())[:16].hex().encode()

    def _mask(self, day: int, name: str) -> bytes:
        return self._secret.mac("discovery peer", str(day).encode(), name.lower().encode())


def _open() -> AsyncZeroconf:
    try:
        return AsyncZeroconf(InterfaceChoice.All, ip_version=IPVersion.All)
    except OSError:  # a machine without IPv6
        return AsyncZeroconf(InterfaceChoice.All, ip_version=IPVersion.V4Only)


def _content(info: AsyncServiceInfo) -> tuple[object, ...]:
    """What does not change as long as nothing is new: names and masks are random."""
    return info.port, sorted(info.parsed_addresses()), info.properties[b"f"]


def _interfaces() -> set[tuple[str, str]]:
    return {(name, one.address) for name, all_of in psutil.net_if_addrs().items() for one in all_of}


def _is_near(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is on a network that this machine is on."""
    for all_of in psutil.net_if_addrs().values():
        for one in all_of:
            if one.netmask:
                with suppress(ValueError):  # no IP address
                    if ip in ipaddress.ip_interface(f"{one.address.partition('%')[0]}/{_prefix(one.netmask)}").network:
                        return True
    return False


def _prefix(netmask: str) -> int:
    """Bits of a netmask. Raises `ValueError`."""
    return int(ipaddress.ip_address(netmask)).bit_count()


def _places(addresses: Iterable[str]) -> list[tuple[str, int]]:
    """IP address and TCP port of each full multiaddr that has just these."""
    found: list[tuple[str, int]] = []
    for address in addresses:
        parts = [(part.name, value) for part, value in Multiaddr(address.rpartition("/p2p/")[0]).items()]
        if len(parts) == 2 and parts[0][0] in ("ip4", "ip6") and parts[1][0] == "tcp":
            found.append((parts[0][1], int(parts[1][1])))
    return found


def _from_hex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return b""


def _xor(data: bytes, mask: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(data, mask, strict=False))


def _to_peer_id(digest: bytes) -> str:
    return base58.b58encode(_MULTIHASH + digest).decode()
