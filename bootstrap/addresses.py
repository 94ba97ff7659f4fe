"""Multiaddrs: those that users give are checked, those that others are told are chosen."""

import ipaddress
from collections.abc import Iterable

import base58
import psutil
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.ports import ANY, has_ipv6
from protocol.errors import BadUsage

_EXAMPLE = "/ip4/192.0.2.1/tcp/31337/p2p/Qm…"


def split_peer_address(address: str) -> tuple[PeerID, Multiaddr]:
    """The peer ID in an address like /ip4/…/tcp/…/p2p/ID, and the rest of it. Raises `BadUsage`."""
    location, separator, peer_id = address.rpartition("/p2p/")
    try:
        if not separator or not location or len(base58.b58decode(peer_id)) < 34:
            raise ValueError
        where = Multiaddr(location)
        _check_port(parts_of(where))
        return PeerID.from_base58(peer_id), where
    except Exception as error:  # hivemind's Multiaddr raises errors of many kinds
        raise BadUsage(f"{address!r} is not the address of a peer; expected one like {_EXAMPLE}.") from error


def check_announced(address: str, peer_id: str) -> str:
    """The address `address`, which others are to reach the peer `peer_id` at, without /p2p. Raises `BadUsage`."""
    location, separator, named = address.partition("/p2p/")
    if separator and named != peer_id:
        raise BadUsage(f"{address!r} names another peer; this one is {peer_id}.")
    try:
        where = Multiaddr(location)
        _check_port(parts_of(where))
        ip = ip_of(where)
        if ip is not None and (ip.is_unspecified or ip.is_link_local):  # `for_others` would leave none
            raise ValueError
    except Exception as error:
        raise BadUsage(f"{address!r} cannot be announced; expected one like /ip4/192.0.2.1/tcp/31337.") from error
    return location


def _check_port(parts: dict[str, str]) -> None:
    """Raises `ValueError` where nobody could connect. Multiaddr takes addresses without a port, and a port of 0."""
    if "dnsaddr" not in parts and parts.get("tcp", parts.get("udp", "0")) == "0":  # dnsaddr: the port is in the DNS
        raise ValueError


def listening_addresses(host: str, port: int) -> list[str]:
    """The multiaddrs of an IP address, or of `ANY` of this machine's, and a TCP port. Raises `BadUsage`."""
    if not 0 <= port < 2**16:
        raise BadUsage(f"{port} is not a port number (0 to 65535; 0: any free one).")
    if host == ANY:
        return [f"/ip4/0.0.0.0/tcp/{port}", *([f"/ip6/::/tcp/{port}"] if has_ipv6() else [])]
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise BadUsage(f"{host!r} is not an IP address to listen on; {ANY} stands for all of them.") from error
    return [f"/ip{version}/{host}/tcp/{port}"]


def is_loopback(host: str) -> bool:
    """Whether the IP address `host` is reachable from this machine alone."""
    return host != ANY and ipaddress.ip_address(host).is_loopback


def own_ports(visible: Iterable[Multiaddr]) -> dict[int, int]:
    """IP version -> the TCP port in those of `visible` that are this machine's own; a router's may be another."""
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return {
        ip.version: int(parts["tcp"])
        for address in visible
        if (ip := ip_of(address)) is not None and str(ip) in own and "tcp" in (parts := parts_of(address))
    }


def for_others(visible: Iterable[Multiaddr], peer_id: str) -> list[str]:
    """The full addresses among `visible` that others can join with.

    Loopback addresses only if there is nothing else; no unspecified and no link-local ones. IPv4 ones come first.
    """
    by_scope: dict[bool, list[str]] = {True: [], False: []}
    for address in visible:
        ip = ip_of(address)
        if ip is not None and (ip.is_unspecified or ip.is_link_local):
            continue
        text = str(address).partition(f"/p2p/{peer_id}")[0] + f"/p2p/{peer_id}"
        by_scope[ip is not None and ip.is_loopback].append(text)
    return sorted(by_scope[False] or by_scope[True], key=lambda address: address.startswith("/ip6/"))


def ip_of(address: Multiaddr) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in `address`, if there is one."""
    parts = parts_of(address)
    text = parts.get("ip4") or parts.get("ip6")
    return ipaddress.ip_address(text) if text else None


def parts_of(address: Multiaddr) -> dict[str, str]:
    """Protocol -> value."""
    return {protocol.name: value for protocol, value in address.items()}
