"""The networks that this machine is in."""

import ipaddress
import socket
from collections.abc import Iterable

import psutil

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def own_interfaces() -> frozenset[Interface]:
    """This machine's addresses with the networks that they are in, now; loopback is left out.

    So are IPv6's link-local addresses: libp2p does not connect to them.
    """
    found = set[Interface]()
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and entry.netmask:
                ip = ipaddress.ip_address(entry.address.partition("%")[0])
                length = int(ipaddress.ip_address(entry.netmask)).bit_count()
                if not ip.is_loopback and not (ip.version == 6 and ip.is_link_local):
                    found.add(ipaddress.ip_interface((ip, length)))
    return frozenset(found)


def is_near(address: Address, interfaces: Iterable[Interface]) -> bool:
    """Whether an address is in one of this machine's networks, and so reached without a router."""
    return any(address in interface.network for interface in interfaces)
