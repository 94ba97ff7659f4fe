"""Sealed requests and answers: bytes that only a holder of the swarm's key can have sent, to this member, just now."""

import secrets
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from hivemind.p2p import PeerID

from protocol.errors import PeerUnreachable, SwarmError, WrongKey
from protocol.name import NAME
from protocol.swarm_key import ID_BYTES, NO_KEY, OPEN, REFUSED, SwarmKey, key_with_id

WINDOW = 30.0
"""Seconds by which a request's time may be off. Requests are remembered for so long, so that none is accepted twice."""
CLOCKS_DIFFER = "its clock and this machine's differ by more than 3 s; set both, by NTP for instance"
_REQUEST, _ANSWER, _REFUSAL = (f"\x07{NAME} {what} 1".encode() for what in ("request", "answer", "no"))
"""The first bytes of each. No protobuf message begins with byte 7, so that they cannot be mistaken for one."""
_HEADER = struct.Struct(f"<{ID_BYTES}sd16s")
"""The key's ID, seconds since the epoch, a nonce."""
_MAC_BYTES = 32
_PURPOSE = "dht"


class Refusal(IntEnum):
    """Why a request is not let in."""

    NO_KEY = 1
    WRONG_KEY = 2
    OPEN = 3
    CLOCKS_DIFFER = 4
    REPEATED = 5

    def to_answer(self) -> bytes:
        """The bytes of the answer that refuses."""
        return _REFUSAL + bytes([self])

    def error(self) -> SwarmError:
        """The error that a refused sender raises."""
        if self is Refusal.CLOCKS_DIFFER:
            return PeerUnreachable(CLOCKS_DIFFER)
        if self is Refusal.REPEATED:
            return PeerUnreachable("it took a request for the repetition of another")
        return WrongKey({Refusal.NO_KEY: NO_KEY, Refusal.WRONG_KEY: REFUSED, Refusal.OPEN: OPEN}[self])


class Refused(Exception):
    """A request that is not accepted."""

    def __init__(self, why: Refusal):
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Route:
    """The sender, the receiver and the method of a request."""

    method: str
    sender: PeerID
    receiver: PeerID

    def parts(self) -> tuple[bytes, bytes, bytes]:
        """The route as parts of a MAC."""
        return self.method.encode(), self.sender.to_bytes(), self.receiver.to_bytes()


@dataclass(frozen=True)
class SealedRequest:
    """A request under a key; seals the answer, or opens it."""

    key: SwarmKey
    route: Route
    header: bytes
    body: bytes

    @classmethod
    def seal(cls, key: SwarmKey, route: Route, body: bytes, now: float) -> Self:
        """A new request with the content `body`. `now`: seconds since the epoch."""
        return cls(key, route, _HEADER.pack(key.id, now, secrets.token_bytes(16)), body)

    @classmethod
    def open(cls, keys: Sequence[SwarmKey], route: Route, data: bytes, now: float, seen: "Nonces") -> Self:
        """The request in `data`, which came over `route`. Raises `Refused`."""
        if not data.startswith(_REQUEST):
            raise Refused(Refusal.NO_KEY)
        start = len(_REQUEST)
        header, mac = data[start : start + _HEADER.size], data[start + _HEADER.size :][:_MAC_BYTES]
        if len(mac) < _MAC_BYTES:
            raise Refused(Refusal.WRONG_KEY)
        key_id, sent, nonce = _HEADER.unpack(header)
        key = key_with_id(keys, key_id)
        if key is None:
            raise Refused(Refusal.WRONG_KEY)
        request = cls(key, route, header, data[start + _HEADER.size + _MAC_BYTES :])
        if not key.verify(mac, _PURPOSE, *request._parts()):
            raise Refused(Refusal.WRONG_KEY)
        if not abs(sent - now) <= WINDOW:  # NaN is refused too
            raise Refused(Refusal.CLOCKS_DIFFER)
        if not seen.add(nonce, now):
            raise Refused(Refusal.REPEATED)
        return request

    def to_bytes(self) -> bytes:
        """The request as it crosses the wire."""
        return b"".join((_REQUEST, self.header, self.key.mac(_PURPOSE, *self._parts()), self.body))

    def seal_answer(self, body: bytes) -> bytes:
        """The answer `body` as it crosses the wire."""
        return b"".join((_ANSWER, self.key.mac(_PURPOSE, *self._answer_parts(body)), body))

    def open_answer(self, data: bytes) -> bytes:
        """The answer's content. Raises `WrongKey` when its receiver shows no key."""
        mac, body = data[len(_ANSWER) :][:_MAC_BYTES], data[len(_ANSWER) + _MAC_BYTES :]
        if not data.startswith(_ANSWER) or not self.key.verify(mac, _PURPOSE, *self._answer_parts(body)):
            raise WrongKey(f"Peer {self.route.receiver} does not hold the key of this swarm.")
        return body

    def _parts(self) -> tuple[bytes, ...]:
        return b"request", *self.route.parts(), self.header, self.body

    def _answer_parts(self, body: bytes) -> tuple[bytes, ...]:
        return b"answer", *self.route.parts(), self.header, self.body, body


class Nonces:
    """The nonces of requests that are young enough to be accepted if they came again."""

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, nonce: bytes, now: float) -> bool:
        """Remember a nonce; False when it is known."""
        while self._until and next(iter(self._until.values())) < now:
            self._until.popitem(last=False)
        if nonce in self._until:
            return False
        self._until[nonce] = now + 2 * WINDOW  # its request's time may be a window ahead of now
        return True


def is_sealed(data: bytes) -> bool:
    """Whether `data` is a sealed request."""
    return data.startswith(_REQUEST)


def refusal_in(answer: bytes) -> Refusal | None:
    """The refusal that an answer is, if it is one."""
    if not answer.startswith(_REFUSAL):
        return None
    code = answer[len(_REFUSAL) :]
    return Refusal(code[0]) if len(code) == 1 and code[0] in list(Refusal) else Refusal.WRONG_KEY
