"""Sealed requests and answers: bytes that only a holder of the swarm's secret can have sent, to this member, just now.

Inside is the sender's certificate, so that the receiver can tell whether he may.
"""

import secrets
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

from hivemind.p2p import PeerID

from protocol.errors import NotAMember
from protocol.membership.refusals import Refusal, Refused
from protocol.membership.secret import SwarmSecret
from protocol.name import NAME

WINDOW = 30.0
"""Seconds by which a request's time may be off. Requests are remembered for so long, so that none is accepted twice."""
_REQUEST, _ANSWER, _REFUSAL = (f"\x07{NAME} {what} 2".encode() for what in ("request", "answer", "no"))
"""The first bytes of each. No protobuf message begins with byte 7, so that they cannot be mistaken for one."""
_HEADER = struct.Struct("<d16s")
"""Seconds since the epoch, a nonce."""
_LENGTH = struct.Struct("<H")
_MAC_BYTES = 32
_PURPOSE = "dht"


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
class Sealed:
    """What is inside of a request or an answer."""

    certificate: bytes
    """The sender's."""
    body: bytes

    def to_bytes(self) -> bytes:
        """As it crosses the wire, behind a MAC."""
        return b"".join((_LENGTH.pack(len(self.certificate)), self.certificate, self.body))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises `Refused` for bytes that are too short."""
        if len(data) < _LENGTH.size:
            raise Refused(Refusal.OTHER_SWARM)
        end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        if len(data) < end:
            raise Refused(Refusal.OTHER_SWARM)
        return cls(data[_LENGTH.size : end], data[end:])


@dataclass(frozen=True)
class SealedRequest:
    """A request under the secret; seals the answer, or opens it."""

    secret: SwarmSecret
    route: Route
    header: bytes
    content: bytes
    """A `Sealed`."""

    @property
    def inside(self) -> Sealed:
        """The sender's certificate and the request itself. Raises `Refused`."""
        return Sealed.from_bytes(self.content)

    @classmethod
    def seal(cls, secret: SwarmSecret, route: Route, inside: Sealed, now: float) -> Self:
        """A new request. `now`: seconds since the epoch."""
        return cls(secret, route, _HEADER.pack(now, secrets.token_bytes(16)), inside.to_bytes())

    @classmethod
    def open(cls, secret: SwarmSecret, route: Route, data: bytes, now: float, seen: "Nonces") -> Self:
        """The request in `data`, which came over `route`. Raises `Refused`."""
        if not data.startswith(_REQUEST):
            raise Refused(Refusal.STRANGER)
        start = len(_REQUEST)
        header, mac = data[start : start + _HEADER.size], data[start + _HEADER.size :][:_MAC_BYTES]
        if len(mac) < _MAC_BYTES:
            raise Refused(Refusal.OTHER_SWARM)
        request = cls(secret, route, header, data[start + _HEADER.size + _MAC_BYTES :])
        if not secret.verify(mac, _PURPOSE, *request._parts()):
            raise Refused(Refusal.OTHER_SWARM)
        sent, nonce = _HEADER.unpack(header)
        if not abs(sent - now) <= WINDOW:  # NaN is refused too
            raise Refused(Refusal.CLOCKS_DIFFER)
        if not seen.add(nonce, now):
            raise Refused(Refusal.REPEATED)
        return request

    def to_bytes(self) -> bytes:
        """The request as it crosses the wire."""
        return b"".join((_REQUEST, self.header, self.secret.mac(_PURPOSE, *self._parts()), self.content))

    def seal_answer(self, inside: Sealed) -> bytes:
        """An answer as it crosses the wire."""
        content = inside.to_bytes()
        return b"".join((_ANSWER, self.secret.mac(_PURPOSE, *self._answer_parts(content)), content))

    def open_answer(self, data: bytes) -> Sealed:
        """What is inside of an answer. Raises `NotAMember` when its receiver does not hold the secret."""
        mac, content = data[len(_ANSWER) :][:_MAC_BYTES], data[len(_ANSWER) + _MAC_BYTES :]
        try:
            if data.startswith(_ANSWER) and self.secret.verify(mac, _PURPOSE, *self._answer_parts(content)):
                return Sealed.from_bytes(content)
        except Refused:
            pass
        raise NotAMember(f"Peer {self.route.receiver} is no member of this swarm.")

    def _parts(self) -> tuple[bytes, ...]:
        return b"request", *self.route.parts(), self.header, self.content

    def _answer_parts(self, content: bytes) -> tuple[bytes, ...]:
        return b"answer", *self.route.parts(), self.header, self.content, content


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


def refusal_answer(why: Refusal) -> bytes:
    """The bytes of the answer that refuses a request."""
    return _REFUSAL + bytes([why])


def refusal_in(answer: bytes) -> Refusal | None:
    """The refusal that an answer is, if it is one."""
    if not answer.startswith(_REFUSAL):
        return None
    code = answer[len(_REFUSAL) :]
    return Refusal(code[0]) if len(code) == 1 and code[0] in list(Refusal) else Refusal.OTHER_SWARM
