"""A member asks another to dial it, and is told what came of it: whether others can reach it, by either carrier.

The question names ports only. They are dialled at the addresses from which the asker's own connections come, whose peer
ID libp2p has authenticated, and nowhere else: so nobody has another member dial a third machine. Nothing is sent
there (p2pd greets by itself), or TLS's first message (a door), and nothing that was read is passed on, but one of
`Outcome`. The questions of all, and of each host, are counted.
"""

import asyncio
import ipaddress
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from protocol.errors import BadRequest, PeerUnreachable
from protocol.name import NAME
from protocol.records import Door, HostText, Port, Record
from protocol.stream import Carrier
from protocol.transport.direct import DirectCaller

METHOD = f"{NAME}.dial_back"
TIMEOUT = 5.0
"""Seconds for one attempt."""
PER_HOST, PER_MEMBER = 12, 60
"""Questions a minute that one member answers, of one host and of all."""
MAX_HOSTS = 2
_MINUTE = 60.0
_GREETING = b"\x13/multistream/1.0.0\n"
"""With which p2pd greets whoever connects."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Outcome(StrEnum):
    """What came of an attempt."""

    REACHED = "reached"
    REFUSED = "refused"
    SILENT = "silent"
    NO_WAY = "no way"
    ANOTHER = "another"
    """Somebody else answers there."""


class _Said(Record):
    MAX_BYTES = 4096


class Question(_Said):
    """Where the asker listens, on the machine that it asks from."""

    port: Port
    """p2pd's."""
    door: Port | None = None
    fingerprint: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of the door; see `Door`."""


class Attempt(_Said):
    """One that was made."""

    host: HostText
    """The asker's IP address, as the one who was asked sees it."""
    carrier: Carrier
    outcome: Outcome


class Answer(_Said):
    """What came of it all."""

    attempts: Annotated[tuple[Attempt, ...], Field(max_length=2 * MAX_HOSTS)] = ()
    too_often: bool = False
    """Nothing was tried, as so many have asked of late."""


class DialBack:
    """Answers such questions."""

    def __init__(self, hosts: Callable[[str], Awaitable[Collection[_Address]]], caller: DirectCaller):
        """`hosts`: a peer's ID -> the addresses that its connections to this member come from, relays' left out."""
        self._hosts, self._caller = hosts, caller
        self._asked = deque[tuple[float, str]](maxlen=PER_MEMBER)
        """When somebody asked, from where."""

    async def answer(self, peer_id: str, data: bytes) -> bytes:
        """The `Answer` to a `Question` of `peer_id`, as bytes; empty for what is no question."""
        try:
            question = Question.from_bytes(data)
        except BadRequest:
            return b""
        hosts = sorted(map(str, await self._hosts(peer_id)))[:MAX_HOSTS]
        if not all(map(self._may_ask, hosts)):
            return Answer(too_often=True).to_bytes()
        ways: list[tuple[str, Carrier, Awaitable[Outcome]]] = []
        for host in hosts:
            ways.append((host, "libp2p", _outcome(_greet(host, question.port))))
            if question.door is not None and question.fingerprint is not None:
                door = Door(fingerprint=question.fingerprint, addresses=((host, question.door),))
                ways.append((host, "direct", _outcome(self._enter(peer_id, door))))
        outcomes = await asyncio.gather(*(attempt for _, _, attempt in ways))
        attempts = [
            Attempt(host=host, carrier=carrier, outcome=outcome)
            for (host, carrier, _), outcome in zip(ways, outcomes, strict=True)
        ]
        return Answer(attempts=tuple(attempts)).to_bytes()

    def _may_ask(self, host: str) -> bool:
        now = time.monotonic()
        while self._asked and self._asked[0][0] < now - _MINUTE:
            self._asked.popleft()
        if len(self._asked) >= PER_MEMBER or sum(other == host for _, other in self._asked) >= PER_HOST:
            return False
        self._asked.append((now, host))
        return True

    async def _enter(self, peer_id: str, door: Door) -> None:
        (await self._caller.connect(peer_id, door)).close()


async def reach(host: str, port: int) -> Outcome:
    """What comes of connecting to p2pd at a TCP port of `host`, an IP address or a name."""
    return await _outcome(_greet(host, port))


async def _outcome(attempt: Awaitable[None]) -> Outcome:
    try:
        async with asyncio.timeout(TIMEOUT):
            await attempt
    except TimeoutError:
        return Outcome.SILENT
    except (OSError, PeerUnreachable, EOFError) as error:
        return _kind_of(error.__cause__ if isinstance(error, PeerUnreachable) and error.__cause__ else error)
    return Outcome.REACHED


def _kind_of(error: BaseException) -> Outcome:
    if isinstance(error, ConnectionRefusedError):
        return Outcome.REFUSED
    if isinstance(error, TimeoutError):
        return Outcome.SILENT
    # Broken off while it was greeted, or in TLS's greeting, which are errors of the system's, too.
    is_answered = isinstance(error, PeerUnreachable | EOFError | ConnectionError | ssl.SSLError)
    return Outcome.ANOTHER if is_answered else Outcome.NO_WAY


async def _greet(host: str, port: int) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        if await reader.readexactly(len(_GREETING)) != _GREETING:
            raise PeerUnreachable("That is not libp2p.")
    finally:
        writer.close()
