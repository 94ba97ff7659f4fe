"""TCP ports that a member listens at."""

import ipaddress
import socket

from protocol.errors import BadUsage

ANY = "any"
"""In place of an IP address: all of this machine's, IPv4 and IPv6."""


def has_ipv6() -> bool:
    """Whether this machine can listen at IPv6 addresses."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def bind(host: str, port: int, purpose: str = "", v6_only: bool = False) -> socket.socket:
    """A socket bound to a port (0: any free one) of the IP address `host`, or of `ANY`.

    `v6_only`: where `host` is ::, leave the port of IPv4 addresses to others. Raises `BadUsage` when the port cannot be
    had; the message ends with `purpose`.
    """
    is_any = host == ANY
    if is_any:
        host = "::" if has_ipv6() else "0.0.0.0"
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a restart old connections linger
        if family == socket.AF_INET6 and (v6_only or is_any):
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not is_any))
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise BadUsage(f"Cannot listen on {host}, port {port}{purpose}: {error.strerror or error}.") from error
    return bound
