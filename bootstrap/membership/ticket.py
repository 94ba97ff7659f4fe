"""An invitation as one line of text that survives a chat program, and as what a camera reads.

    hivetune1-BASE64URL of: version, root key, secret, minute in which it expires, peers with their addresses, check sum

Whoever has the line may join until it is used up, expired or cancelled. It names the swarm's root, so that the one who
joins can tell a member from somebody who only answers at the address.
"""

import base64
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from bootstrap.membership.packed import read_peers, write_peers
from protocol.errors import BadUsage
from protocol.membership.certificate import ID_BYTES, KEY_BYTES
from protocol.name import NAME

VERSION = 1
SECRET_BYTES = 16
MAX_CHARACTERS = 299
_PREFIX = f"{NAME}1-"
_CHECK_BYTES = 4
_HEAD = struct.Struct(f"<B{KEY_BYTES}s{SECRET_BYTES}sI")


@dataclass(frozen=True)
class Ticket:
    """What an invitation says to the machine that is to join."""

    root: bytes
    """The swarm's public key (32 bytes)."""
    secret: bytes
    """16 random bytes, good for as many machines as the invitation has uses."""
    expires: int
    """Seconds since the epoch; whole minutes."""
    addresses: tuple[str, ...]
    """Full multiaddrs of members, with IP addresses and TCP ports."""

    @property
    def invitation(self) -> bytes:
        """The ID of the invitation, which tells nothing about its secret."""
        return hash_secret(self.secret)

    def to_text(self) -> str:
        """The line; addresses that do not fit are left out, the last first."""
        addresses = list(self.addresses)
        while len(text := self._encode(addresses)) > MAX_CHARACTERS:
            addresses.pop()
        return text

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Raises `BadUsage` for anything but a whole ticket of this version."""
        text = "".join(text.split())  # chat programs break lines
        if not text.startswith(_PREFIX):
            if text.startswith(NAME) and "-" in text[:20]:
                raise BadUsage(
                    f"The ticket was made by another version of {NAME}; update the older of the two machines."
                )
            raise BadUsage(f"That is no ticket; expected the line that `peer invite` prints: {_PREFIX}...")
        try:
            body = _decode(text.removeprefix(_PREFIX))
            version, root, secret, minutes = _HEAD.unpack_from(body)
            if version != VERSION:
                raise ValueError
            return cls(root, secret, minutes * 60, tuple(read_peers(body[_HEAD.size :])))
        except (ValueError, struct.error, LookupError) as error:
            raise BadUsage("The ticket is damaged; copy the whole line that `peer invite` printed.") from error

    def _encode(self, addresses: Iterable[str]) -> str:
        head = _HEAD.pack(VERSION, self.root, self.secret, self.expires // 60)
        return _PREFIX + _encode(head + write_peers(addresses))


def hash_secret(secret: bytes) -> bytes:
    """The ID of the invitation with this secret."""
    return hashlib.sha256(f"{NAME} invitation 1\0".encode() + secret).digest()[:ID_BYTES]


def _encode(body: bytes) -> str:
    return base64.urlsafe_b64encode(body + hashlib.sha256(body).digest()[:_CHECK_BYTES]).decode().rstrip("=")


def _decode(text: str) -> bytes:
    """What `_encode` has made `text` of. Raises `ValueError`."""
    body = base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)[:-_CHECK_BYTES]
    if _encode(body) != text:
        raise ValueError("damaged")
    return body
