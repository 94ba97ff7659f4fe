"""Who says that somebody is a member: a chain of signed statements that begins with the swarm's root key.

    root key  ->  an admin's key  ->  (other admins' keys)  ->  a member's key  ->  the peer ID of one of its processes

The root's public key is the swarm: who can show a chain from it is a member. Only admins may speak of others' keys;
every member may speak of its own processes, so that several of them can run on a machine, each with its own identity.
Carriers authenticate peer IDs. So a chain that ends in the peer ID at the other end of a connection is that end's.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from protocol.membership import membership_pb2 as pb
from protocol.name import NAME

MAX_CHAIN = 8
"""Statements between the root and a process."""
MAX_CERTIFICATE_BYTES = 2048
MAX_NAME = 40
KEY_BYTES, ID_BYTES = 32, 16
DAY = 86_400
LIFETIME = 30 * DAY
"""Seconds for which a certificate holds, if nobody says otherwise."""
ADMIN_LIFETIME = 3650 * DAY
"""An admin's. A short one would keep nobody out: an admin could renew its own, or let itself in again."""
MAX_LIFETIME = ADMIN_LIFETIME
_CONTEXT = f"{NAME} membership 1\0".encode()


class BadStatement(ValueError):
    """Not a statement, or one that nobody may make who has signed it."""


class Role(IntEnum):
    """What a member may do. Each role may do what those before it may."""

    USE = pb.USE
    """Sessions, training."""
    SERVE = pb.SERVE
    """Announcing blocks, sharing weights."""
    ADMIN = pb.ADMIN
    """Inviting and revoking."""


class SigningKey:
    """An Ed25519 private key: the root's or a member's."""

    def __init__(self, private: bytes):
        """`private`: the 32 bytes of RFC 8032's seed. Raises `ValueError`."""
        self.private = private
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()
        """32 bytes."""

    @classmethod
    def generate(cls) -> Self:
        """A new key."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """A signature (64 bytes) of `data`."""
        return self._key.sign(data)


def has_signed(key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` is one of `data` by the owner of the Ed25519 public key `key`."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def name_of(key: bytes) -> str:
    """The short name of a key, for people and logs: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:16]


@dataclass(frozen=True)
class Certificate:
    """A statement that somebody is a member."""

    signed: bytes
    """A serialized `Signed`."""
    key: bytes
    role: Role
    name: str
    issued: int
    expires: int
    admitted: int
    invitation: bytes
    issuers: tuple[bytes, ...]
    """The keys of the admins between the root and this member, nearest first."""

    @property
    def id(self) -> str:
        """The member's short name, which follows from its key."""
        return name_of(self.key)


@dataclass(frozen=True)
class Revocation:
    """A statement that somebody is a member no more."""

    signed: bytes
    key: bytes
    time: int
    issuers: tuple[bytes, ...]


@dataclass(frozen=True)
class Invitation:
    """A statement that whoever has a secret may be let in."""

    signed: bytes
    id: bytes
    role: Role
    uses: int
    expires: int
    lifetime: int
    cancelled: bool
    issuers: tuple[bytes, ...]


@dataclass(frozen=True)
class Process:
    """A statement that a peer ID is one of a member's processes."""

    signed: bytes
    peer_id: str
    member: Certificate


Statement = Certificate | Revocation | Invitation | Process


@dataclass(frozen=True)
class Signer:
    """Who makes statements: the root, or a member with its certificate."""

    key: SigningKey
    certificate: Certificate | None
    """None: the root."""

    def certify(
        self, key: bytes, role: Role, name: str, now: int, lifetime: int, invitation: bytes = b"", admitted: int = 0
    ) -> bytes:
        """A certificate (a serialized `Signed`) for the owner of `key`.

        `now`, `admitted` (0: now): seconds since the epoch; `lifetime`: seconds.
        """
        member = pb.Member(
            key=key, role=role.value, name=name, issued=now, expires=now + lifetime, admitted=admitted or now,
            invitation=invitation,
        )  # fmt: skip
        return self._sign(pb.Statement(member=member))

    def revoke(self, key: bytes, now: int) -> bytes:
        """The statement that the owner of `key` is a member no more."""
        return self._sign(pb.Statement(revocation=pb.Revocation(key=key, time=now)))

    def invite(
        self, invitation: bytes, role: Role, uses: int, expires: int, lifetime: int, cancelled: bool = False
    ) -> bytes:
        """An invitation, or with `cancelled` its end."""
        said = pb.Invitation(
            id=invitation, role=role.value, uses=uses, expires=expires, lifetime=lifetime, cancelled=cancelled
        )
        return self._sign(pb.Statement(invitation=said))

    def certify_process(self, peer_id: str) -> bytes:
        """The statement that `peer_id` is a process of this member."""
        return self._sign(pb.Statement(process=pb.Process(peer_id=peer_id)))

    def _sign(self, statement: pb.Statement) -> bytes:
        content = statement.SerializeToString()
        signed = pb.Signed(statement=content, signature=self.key.sign(_CONTEXT + content))
        if self.certificate is not None:
            signed.issuer.ParseFromString(self.certificate.signed)
        return signed.SerializeToString()


def read_statement(root: bytes, data: bytes) -> Statement:
    """The statement in `data`, a serialized `Signed`, if all in its chain from the key `root` may say what they say.

    What is said may be out of date, and its issuers may have been revoked. Raises `BadStatement`.
    """
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise BadStatement("too long")
    return _read(root, bytes(data))


@lru_cache(maxsize=4096)
def _read(root: bytes, data: bytes) -> Statement:
    try:
        signed = pb.Signed.FromString(data)
        signed.DiscardUnknownFields()  # nobody has signed them
        return _checked(root, signed)
    except DecodeError as error:
        raise BadStatement("not a statement") from error


def _checked(root: bytes, signed: pb.Signed) -> Statement:
    issuer: Certificate | None = None
    if signed.HasField("issuer"):
        above = _read(root, signed.issuer.SerializeToString())  # most have been read before
        if not isinstance(above, Certificate):
            raise BadStatement("signed by one who is no member")
        if len(above.issuers) > MAX_CHAIN - 2:
            raise BadStatement("too long a chain")
        issuer = above
    key = root if issuer is None else issuer.key
    if not has_signed(key, _CONTEXT + signed.statement, signed.signature):
        raise BadStatement("the signature is wrong")
    statement = pb.Statement.FromString(signed.statement)
    about = statement.WhichOneof("about")
    if about is None:
        raise BadStatement("says nothing")
    if about == "process":
        if issuer is None:
            raise BadStatement("the root has no processes")
        return Process(signed.SerializeToString(), _bounded(statement.process.peer_id, 100), issuer)
    if issuer is not None and issuer.role < Role.ADMIN:
        raise BadStatement("signed by one who is no admin")
    issuers = () if issuer is None else (issuer.key, *issuer.issuers)
    return _READERS[about](statement, signed.SerializeToString(), issuers, issuer)


def _read_member(
    statement: pb.Statement, data: bytes, issuers: tuple[bytes, ...], issuer: Certificate | None
) -> Certificate:
    said = statement.member
    if issuer is not None and not issuer.issued - DAY <= said.issued <= issuer.expires:
        raise BadStatement("signed before its issuer was an admin, or after")
    if len(said.key) != KEY_BYTES or not said.admitted <= said.issued < said.expires <= said.issued + MAX_LIFETIME:
        raise BadStatement("no certificate")
    return Certificate(
        data, said.key, _role(said.role), _bounded(said.name, MAX_NAME), said.issued, said.expires, said.admitted,
        _id(said.invitation), issuers,
    )  # fmt: skip


def _read_revocation(
    statement: pb.Statement, data: bytes, issuers: tuple[bytes, ...], issuer: Certificate | None
) -> Revocation:
    said = statement.revocation
    if len(said.key) != KEY_BYTES:
        raise BadStatement("no revocation")
    return Revocation(data, said.key, said.time, issuers)


def _read_invitation(
    statement: pb.Statement, data: bytes, issuers: tuple[bytes, ...], issuer: Certificate | None
) -> Invitation:
    said = statement.invitation
    if not said.id or not said.uses or not 0 < said.lifetime <= MAX_LIFETIME:
        raise BadStatement("no invitation")
    return Invitation(
        data, _id(said.id), _role(said.role), said.uses, said.expires, said.lifetime, said.cancelled, issuers
    )


_READERS: dict[str, Callable[[pb.Statement, bytes, tuple[bytes, ...], Certificate | None], Statement]] = {
    "member": _read_member,
    "revocation": _read_revocation,
    "invitation": _read_invitation,
}


def _role(number: int) -> Role:
    try:
        return Role(number)
    except ValueError as error:
        raise BadStatement("unknown role") from error


def _bounded(text: str, length: int) -> str:
    if len(text) > length or not text.isprintable():
        raise BadStatement("unprintable or too long a name")
    return text


def _id(data: bytes) -> bytes:
    if len(data) not in (0, ID_BYTES):
        raise BadStatement("wrong length")
    return data
