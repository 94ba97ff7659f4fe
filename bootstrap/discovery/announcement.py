"""What a member announces: a name and where it can be reached, both of use to members of its swarm only.

    name     salt (8 random bytes), MAC of the salt (8 bytes), in hex
    sealed   nonce (12 random bytes), then by ChaCha20-Poly1305: ID and addresses; the name is authenticated with it

The keys are derived from the swarm's secret for one day (UTC), and the salt is drawn anew each day. So an
outsider cannot tell whether two announcements are of one swarm, and nobody can make one without the secret.
"""

import hmac
import os
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from bootstrap.membership.packed import read_peers, write_peers
from protocol.membership.secret import SwarmSecret

MAX_ADDRESSES = 16
MAX_BYTES = 600
"""Of what is sealed: far more than `MAX_ADDRESSES` take."""
_SALT_BYTES = _MAC_BYTES = 8
_NONCE_BYTES = 12
_NAME, _ADDRESSES = "discovery name", "discovery addresses"


def day_of(now: float) -> int:
    """The day (UTC) of a time in seconds since the epoch."""
    return int(now // 86400)


def new_name(secret: SwarmSecret, day: int) -> str:
    """The name of a member for one day: 32 characters."""
    salt = os.urandom(_SALT_BYTES)
    return (salt + _fingerprint(secret, day, salt)).hex()


def find_day(secret: SwarmSecret, name: str, today: int) -> int | None:
    """The day for which a member of this swarm has made `name`; None: it is another's, or older than yesterday.

    Tomorrow's are known too: clocks differ.
    """
    try:
        data = bytes.fromhex(name)
    except ValueError:
        return None
    salt, mac = data[:_SALT_BYTES], data[_SALT_BYTES:]
    for day in (today, today - 1, today + 1):
        if hmac.compare_digest(mac, _fingerprint(secret, day, salt)):
            return day
    return None


def seal(secret: SwarmSecret, day: int, name: str, addresses: Iterable[str]) -> bytes:
    """The full multiaddrs `addresses`, of one member, as they are announced under `name`; the first `MAX_ADDRESSES`."""
    nonce = os.urandom(_NONCE_BYTES)
    body = write_peers(list(addresses)[:MAX_ADDRESSES])
    return nonce + _cipher(secret, day).encrypt(nonce, body, name.encode())


def unseal(secret: SwarmSecret, day: int, name: str, sealed: bytes) -> list[str]:
    """What was sealed: full multiaddrs. Raises `ValueError` for what no member of this swarm has sealed."""
    if not _NONCE_BYTES < len(sealed) <= MAX_BYTES:
        raise ValueError("too short or too long")
    try:
        body = _cipher(secret, day).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name.encode())
        return list(read_peers(body))[:MAX_ADDRESSES]
    except (InvalidTag, LookupError) as error:
        raise ValueError("sealed by another") from error


def _fingerprint(secret: SwarmSecret, day: int, salt: bytes) -> bytes:
    return secret.mac(_NAME, day.to_bytes(8, "little"), salt)[:_MAC_BYTES]


def _cipher(secret: SwarmSecret, day: int) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(secret.mac(_ADDRESSES, day.to_bytes(8, "little")))
