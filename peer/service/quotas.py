"""What one client may have of a peer at a time, so that no single one can take it all.

Clients are told apart by their peer ID, which the carrier has authenticated. An identity costs nothing: quotas stop one
greedy client, and a swarm key keeps out those who make many identities.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Annotated

import typer

from protocol.errors import OverQuota

_BURST = 2.0
"""Seconds' worth of bytes that a client may send at once."""


@dataclass(frozen=True)
class Quota:
    """The most that one client may have. Each field is an option of `peer serve`."""

    streams: Annotated[int, typer.Option("--client-streams", min=1, help="Connections of one client.")] = 256
    sessions: Annotated[int, typer.Option("--client-sessions", min=1, help="Generations of one client at a time.")] = (
        128
    )
    """Copies that beam search or a copied cache made included."""
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--client-cache-tokens", min=1, help="Tokens that one client's generations may hold; default: all."
        ),
    ] = None
    """Of all rows of all sessions."""
    calls: Annotated[int, typer.Option("--client-calls", min=1, help="Requests of one client at a time.")] = 64
    adapters: Annotated[int, typer.Option("--client-adapters", min=1, help="Adapters kept for one client.")] = 64
    """The client's own oldest give way to new ones."""
    adapter_bytes: Annotated[
        int | None,
        typer.Option("--client-adapter-bytes", min=1, help="Bytes of adapters kept for one client; default: all."),
    ] = None
    bytes_per_second: Annotated[
        float,
        typer.Option(
            "--client-rate",
            min=1,
            show_default=False,
            help="Bytes per second that one client may send; default: any.",
        ),
    ] = inf
    """As `protocol.channel.Message` counts them."""


@dataclass
class Account:
    """What one client has now. Its tokens in KV caches are counted by `CacheMemory`."""

    quota: Quota
    streams: int = 0
    sessions: int = 0
    _requests: int = 0
    """Being answered."""
    _bucket: "_Bucket | None" = None

    def open_session(self) -> None:
        """Count one more session. Raises `OverQuota`."""
        _check(self.sessions, self.quota.sessions, "sessions")
        self.sessions += 1

    def close_session(self) -> None:
        """One session less."""
        self.sessions -= 1

    @contextmanager
    def request(self, size: int) -> Iterator[None]:
        """A request of `size` bytes is answered within the block. Raises `OverQuota`."""
        _check(self._requests, self.quota.calls, "calls in flight")
        if self.quota.bytes_per_second < inf:
            self._bucket = self._bucket or _Bucket(self.quota.bytes_per_second)
            self._bucket.spend(size)
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1


class Accounts:
    """The accounts of the clients that are connected."""

    def __init__(self, quota: Quota):
        self.quota = quota
        self._open: dict[str, Account] = {}

    def enter(self, client: str) -> Account:
        """A client opened a stream. Raises `OverQuota`."""
        account = self._open.setdefault(client, Account(self.quota))
        _check(account.streams, self.quota.streams, "streams")
        account.streams += 1
        return account

    def __contains__(self, client: str) -> bool:
        """Whether a client has a stream open."""
        return client in self._open

    def leave(self, client: str) -> bool:
        """A client's stream has ended; returns whether it was its last."""
        account = self._open[client]
        account.streams -= 1
        if account.streams:
            return False
        del self._open[client]
        return True


@dataclass
class _Bucket:
    """A token bucket (Turner 1986). One request may overdraw it, as its size is known only when it has come."""

    rate: float
    _level: float = field(init=False)
    _since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._level = self.rate * _BURST

    def spend(self, size: int) -> None:
        now = time.monotonic()
        self._level = min(self.rate * _BURST, self._level + self.rate * (now - self._since))
        self._since = now
        if self._level < 0:
            error = OverQuota(f"One client may send {self.rate:,.0f} bytes per second to this peer; send less at once.")
            error.retry_after = -self._level / self.rate
            raise error
        self._level -= size


def _check(count: int, limit: int, what: str) -> None:
    if count >= limit:
        raise OverQuota(f"One client may have {limit} {what} on this peer at a time; end others first.")
