"""Who may ask, and how much at once."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import ClientDisconnect, Request

from client.gateway.refusals import Refused
from protocol.errors import BadUsage

_log = logging.getLogger(__name__)
_SHORTEST = 16
"""Characters of a key."""
_MINUTE = 60.0
_PATIENCE = 30.0
"""Seconds in which a request must have come."""


@dataclass(frozen=True)
class Limits:
    """How much is let in."""

    body_bytes: int = 2 * 2**20
    requests: int = 256
    """At once, of all clients together."""
    requests_per_key: int = 64
    """At once."""
    requests_per_minute: int = 0
    """Of each key; 0: any number."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class KeyFile:
    """The keys that are let in, one a line; read again when the file has changed. Raises `BadUsage` for a bad one."""

    def __init__(self, path: Path):
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._digests: list[bytes] = []
        self._read()

    def find(self, key: str) -> bytes | None:
        """The digest by which a key is known, if it is one of them."""
        try:
            self._read()
        except BadUsage as error:
            if self._digests:
                _log.error("%s Nobody is let in until then.", error)
            self._digests = []
        asked = hashlib.sha256(key.encode()).digest()
        found = [digest for digest in self._digests if hmac.compare_digest(digest, asked)]
        return found[0] if found else None

    def _read(self) -> None:
        try:
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self._seen = None
            raise BadUsage(f"--api-key {self._path} cannot be read: give a text file with one key a line.") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys or any(len(key) < _SHORTEST or not key.isascii() or " " in key for key in keys):
            raise BadUsage(
                f"--api-key {self._path} must hold one key or more, each a line of {_SHORTEST} letters or digits at "
                "least, such as `openssl rand -hex 16` prints."
            )
        self._seen, self._digests = seen, [hashlib.sha256(key.encode()).digest() for key in keys]


class Doors:
    """Lets requests in. `keys` None: anybody on this machine, by one of the names of this machine."""

    def __init__(self, keys: KeyFile | None, limits: Limits):
        self._keys, self.limits = keys, limits
        self._inside = defaultdict[bytes, int](int)
        self._lately = defaultdict[bytes, deque[float]](deque)

    def check(self, request: Request) -> bytes:
        """By what its sender is known. Raises `Refused`."""
        if self._keys is None:
            # A page of another site whose name leads to this machine would be let in by its address.
            if not is_loopback(request.url.hostname or ""):
                raise Refused(403, "Without --api-key this gateway is asked as localhost or 127.0.0.1 only.")
            return b""
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        found = self._keys.find(key.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise Refused(
                401, "This API key is not known here; send one as `Authorization: Bearer KEY`.", code="invalid_api_key"
            )
        return found

    def enter(self, sender: bytes) -> None:
        """A request is being answered, until `leave`. Raises `Refused` for one too many."""
        limits = self.limits
        if self._inside[sender] >= limits.requests_per_key or sum(self._inside.values()) >= limits.requests:
            raise Refused(
                429, "Too many requests are being answered; send this one again when others have ended.",
                code="too_many_requests", retry_after=1,
            )  # fmt: skip
        if limits.requests_per_minute:
            self._count(sender)
        self._inside[sender] += 1

    def leave(self, sender: bytes) -> None:
        """A request has been answered."""
        self._inside[sender] -= 1
        if not self._inside[sender]:
            del self._inside[sender]

    async def body(self, request: Request) -> bytes:
        """What was sent. Raises `Refused`."""
        # Browsers let any page send other types without asking the server first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "The request must be JSON, and say so: Content-Type: application/json.")
        parts, size = [], 0
        try:
            async with asyncio.timeout(_PATIENCE):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.body_bytes:
                        raise Refused(
                            413, f"The request is larger than {self.limits.body_bytes:,} bytes; send less at once."
                        )
                    parts.append(part)
        except TimeoutError as error:
            raise Refused(408, f"The request was not there within {_PATIENCE:.0f} s; send it again.") from error
        except ClientDisconnect as error:
            raise Refused(400, "The request ended before all of it was there.") from error
        return b"".join(parts)

    def _count(self, sender: bytes) -> None:
        lately, now = self._lately[sender], time.monotonic()
        while lately and now - lately[0] >= _MINUTE:
            lately.popleft()
        if len(lately) >= self.limits.requests_per_minute:
            raise Refused(
                429, f"This key has sent {len(lately)} requests within a minute, which is all that it may.",
                code="rate_limit_exceeded", retry_after=lately[0] + _MINUTE - now,
            )  # fmt: skip
        lately.append(now)
