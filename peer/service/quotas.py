"""What one client may have of a peer at a time, so that no single one can take it all.

Clients are told apart by their peer ID, as the carrier authenticated it. Identities cost nothing, so quotas keep greedy
clients from crowding out others; against a crowd of forged ones there is the swarm key.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import OverQuota

if TYPE_CHECKING:  # the command line reads the defaults below without importing Transformers
    from peer.kv_cache.arena import Arena
    from peer.kv_cache.memory import CacheMemory
    from peer.kv_cache.slots import Run

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
    """What one client has now. To its sessions it is the KV memory, within the quota."""

    quota: Quota
    memory: "CacheMemory"
    streams: int = 0
    sessions: int = 0
    _calls: int = 0
    _tokens: int = 0
    _bucket: "_Bucket | None" = None

    def open_session(self) -> None:
        """Count one more session. Raises `OverQuota`."""
        _check(self.sessions, self.quota.sessions, "sessions")
        self.sessions += 1

    def close_session(self) -> None:
        """One session less."""
        self.sessions -= 1

    @contextmanager
    def call(self, size: int) -> Iterator[None]:
        """A request of `size` bytes is being answered. Raises `OverQuota`."""
        _check(self._calls, self.quota.calls, "calls in flight")
        if self.quota.bytes_per_second < inf:
            self._bucket = self._bucket or _Bucket(self.quota.bytes_per_second)
            self._bucket.spend(size)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    @property
    def max_length(self) -> int:
        """Tokens that one session may hold."""
        return self.memory.max_length

    @property
    def arena(self) -> "Arena":
        """Where cached tokens lie."""
        return self.memory.arena

    @property
    def lock(self) -> threading.RLock:
        """That of the KV memory."""
        return self.memory.lock

    def resize(self, run: "Run", sizes: Sequence[int]) -> int:
        """As `CacheMemory.resize`. Raises `OverQuota`, `PeerFull`."""
        before, limit = run.size, self.quota.cache_tokens
        if limit is not None:
            others = self._tokens - before
            if others + sizes[-1] > limit:
                raise OverQuota(
                    f"One client may hold {limit} tokens in this peer's KV caches, and this one would hold "
                    f"{others + sizes[-1]}; end other generations first, or use another peer."
                )
            sizes = [size for size in sizes if others + size <= limit]
        source = self.memory.resize(run, sizes)
        with self.lock:
            self._tokens += run.size - before
        return source

    def give_back(self, start: int, end: int) -> None:
        """As `CacheMemory.give_back`."""
        self.memory.give_back(start, end)

    def release(self, run: "Run") -> None:
        """As `CacheMemory.release`."""
        with self.lock:
            self._tokens -= run.size
            self.memory.release(run)


class Accounts:
    """The accounts of the clients that are connected."""

    def __init__(self, quota: Quota, memory: "CacheMemory"):
        self.quota, self._memory = quota, memory
        self._open: dict[str, Account] = {}

    @property
    def max_length(self) -> int:
        """Tokens that one session may hold."""
        return self._memory.max_length

    def enter(self, client: str) -> Account:
        """A client opened a stream. Raises `OverQuota`."""
        account = self._open.setdefault(client, Account(self.quota, self._memory))
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
    """A token bucket (Turner 1986) that may be overdrawn by one request: its size is known only when it has come."""

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
