"""Addresses of members, packed as tickets and announcements carry them."""

import ipaddress
from collections.abc import Iterable

import base58
from hivemind.utils.multiaddr import Multiaddr

_HASH_BYTES = 32
_MULTIHASH = b"\x12\x20"
"""What stands before the SHA-256 of a key in a peer ID."""
_IP_BYTES = {4: 4, 6: 16}


def fits(address: str) -> bool:
    """Whether a full multiaddr can be packed: an IP address, a TCP port, a peer."""
    try:
        _split(address)
    except (ValueError, LookupError):
        return False
    return True


def write_peers(addresses: Iterable[str]) -> bytes:
    """Full multiaddrs that `fits`, 7 or 19 bytes each and 33 a peer."""
    peers: dict[bytes, list[bytes]] = {}
    for address in addresses:
        peer, ip, port = _split(address)
        peers.setdefault(peer, []).append(bytes([ip.version]) + ip.packed + port.to_bytes(2, "little"))
    return b"".join(peer + bytes([len(places)]) + b"".join(places) for peer, places in peers.items())


def read_peers(data: bytes) -> Iterable[str]:
    """What `write_peers` has packed. Raises `ValueError`, `LookupError` for anything else."""
    while data:
        peer, count, data = data[:_HASH_BYTES], data[_HASH_BYTES], data[_HASH_BYTES + 1 :]
        for _ in range(count):
            size = _IP_BYTES[data[0]]
            ip = ipaddress.ip_address(data[1 : 1 + size])
            port = int.from_bytes(data[1 + size : 3 + size], "little")
            if len(data) < 3 + size or not port:
                raise ValueError("cut short")
            data = data[3 + size :]
            yield f"/ip{ip.version}/{ip}/tcp/{port}/p2p/{base58.b58encode(_MULTIHASH + peer).decode()}"


def _split(address: str) -> tuple[bytes, ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Hash of the peer's key, IP address and port. Raises `ValueError`, `LookupError` for another kind of address."""
    location, _, peer_id = address.rpartition("/p2p/")
    parts = [(protocol.name, value) for protocol, value in Multiaddr(location).items()]
    (kind, host), (tcp, port) = parts
    multihash = base58.b58decode(peer_id)
    if kind not in ("ip4", "ip6") or tcp != "tcp" or multihash[:2] != _MULTIHASH or len(multihash) != 34:
        raise ValueError("not an address of the common kind")
    return multihash[2:], ipaddress.ip_address(host), int(port)
