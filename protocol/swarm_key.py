"""The key of a private swarm: 32 secret bytes whose holders know each other by message authentication codes."""

import hmac
from collections.abc import Iterable, Sequence
from typing import Protocol

from protocol.name import NAME

KEY_BYTES = 32
ID_BYTES = 8
NO_KEY = "This swarm is private: give its key with --swarm-key (in Python: swarm_key=)."
REFUSED = (
    "This swarm refuses the key that it was given: the key is another swarm's, or has been dropped since; "
    "use the swarm's present key file."
)
OPEN = "A swarm key was given, but this swarm is open: leave --swarm-key out."
_CONTEXT = f"{NAME} key 1".encode()
"""What every key that is derived from a secret begins with, so that no other protocol derives the same."""


class SwarmKey:
    """One key. Its `repr` shows the ID only; the secret is never compared, only MACs are."""

    def __init__(self, secret: bytes):
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a swarm key has {KEY_BYTES} bytes")
        self._secret = secret
        self.id: bytes = _hmac(secret, [_CONTEXT, b"id"])[:ID_BYTES]
        """Names the key among its holders; tells others nothing about the secret."""
        self._derived: dict[str, bytes] = {}

    def mac(self, purpose: str, *parts: bytes) -> bytes:
        """HMAC-SHA-256 (32 bytes) over `parts`, each with its length, under a key derived for `purpose` alone."""
        if purpose not in self._derived:
            self._derived[purpose] = _hmac(self._secret, [_CONTEXT, b"derive", purpose.encode()])
        return _hmac(self._derived[purpose], parts)

    def verify(self, mac: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether `mac` is the one of `purpose` and `parts`. Takes the same time for every wrong one."""
        return hmac.compare_digest(mac, self.mac(purpose, *parts))

    def __repr__(self) -> str:
        return f"SwarmKey({self.id.hex()})"


class Keyring(Protocol):
    """The keys that a member holds."""

    def current(self) -> Sequence[SwarmKey]:
        """At least one; the first is used, all are accepted. May change from one call to the next."""


def key_with_id(keys: Iterable[SwarmKey], key_id: bytes) -> SwarmKey | None:
    """The key among `keys` that is called `key_id`."""
    return next((key for key in keys if key.id == key_id), None)


def _hmac(key: bytes, parts: Iterable[bytes]) -> bytes:
    code = hmac.new(key, digestmod="sha256")
    for part in parts:
        code.update(len(part).to_bytes(8, "little"))
        code.update(part)
    return code.digest()
