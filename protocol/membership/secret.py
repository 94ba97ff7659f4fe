"""The secret of a private swarm: 32 bytes whose holders know each other by message authentication codes.

It hides the swarm: who does not hold it is told nothing, not even by whom he is refused. It lets nobody in; that is
what certificates are for. It stays the same for the swarm's life, so who was a member once can tell that it is there.
"""

import hmac
from collections.abc import Iterable

from protocol.name import NAME

SECRET_BYTES = 32
_CONTEXT = f"{NAME} swarm 1".encode()
"""What every key that is derived from a secret begins with, so that no other protocol derives the same."""


class SwarmSecret:
    """The secret, which is never shown and never compared; only MACs are."""

    def __init__(self, secret: bytes):
        """Raises `ValueError` for a wrong length."""
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a swarm's secret has {SECRET_BYTES} bytes")
        self._secret = secret
        self._derived: dict[str, bytes] = {}

    def mac(self, purpose: str, *parts: bytes) -> bytes:
        """HMAC-SHA-256 (32 bytes) over `parts`, each with its length, under a key derived for `purpose` alone."""
        if purpose not in self._derived:
            self._derived[purpose] = _hmac(self._secret, [_CONTEXT, b"derive", purpose.encode()])
        return _hmac(self._derived[purpose], parts)

    def verify(self, mac: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether `mac` is the one of `purpose` and `parts`. Takes the same time for every wrong one."""
        return hmac.compare_digest(mac, self.mac(purpose, *parts))


def _hmac(key: bytes, parts: Iterable[bytes]) -> bytes:
    code = hmac.new(key, digestmod="sha256")
    for part in parts:
        code.update(len(part).to_bytes(8, "little"))
        code.update(part)
    return code.digest()
