"""The members, revocations and invitations of a swarm, as all members know them.

A set of statements that only grows: of two about one subject, one replaces the other in the same way everywhere. So two
rosters that have heard the same statements, in any order, are equal, and each may be merged into the other at any time.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from protocol.membership import membership_pb2 as pb
from protocol.membership.certificate import (
    DAY,
    BadStatement,
    Certificate,
    Invitation,
    Process,
    Revocation,
    Statement,
    read_statement,
)
from protocol.membership.refusals import Refusal, Refused

MAX_STATEMENTS = 4096
MAX_BYTES = 3 * 2**20
"""Serialized: p2pd carries 4 MiB in one message."""
_MAX_BAD = 64
"""Statements of one sender that may be no good, as those of a later version might be."""
K = TypeVar("K")
T = TypeVar("T")
_FORGOTTEN, _UNUSED = 30 * DAY, 7 * DAY
"""Seconds after which an expired certificate, and an expired invitation by which no member came, is dropped."""


class Roster:
    """What one process knows. Nothing in it is taken on trust: every statement has its chain from the root."""

    def __init__(self, root: bytes, data: bytes = b""):
        """`data`: an earlier roster's bytes."""
        self._root = root
        self.members: dict[bytes, Certificate] = {}
        """Key -> the certificate that was issued last."""
        self.revoked: dict[bytes, Revocation] = {}
        """Key -> its revocation."""
        self.invitations: dict[bytes, Invitation] = {}
        """ID -> the invitation."""
        self._late = set[bytes]()
        """The keys of those who came by an invitation after others had used it up."""
        self.merge(data)

    def merge(self, data: bytes) -> bool:
        """Learn from another roster's bytes, or a part of one. Returns whether anything was new."""
        try:
            signed = pb.Roster.FromString(data).statements[:MAX_STATEMENTS]
        except DecodeError:
            return False
        return self.add(one.SerializeToString() for one in signed)

    def add(self, statements: Iterable[bytes]) -> bool:
        """Learn statements (serialized `Signed`); those that may not be made are left out. Whether any was new."""
        said, bad = list[Statement](), 0
        for data in statements:
            try:
                said.append(read_statement(self._root, data))
            except BadStatement:
                bad += 1
                if bad > _MAX_BAD:  # checking takes time, and no honest member sends these
                    break
        # In the order in which they were made: an admin who is revoked may have revoked others before.
        news = [self._take(statement) for statement in sorted(said, key=_time)]
        if any(news):
            self._find_late()
        return any(news)

    def to_bytes(self) -> bytes:
        """All of it, in one order everywhere."""
        self._drop(time.time())
        known: list[Statement] = [*self.members.values(), *self.revoked.values(), *self.invitations.values()]
        roster = pb.Roster()
        for signed in sorted(statement.signed for statement in known):
            roster.statements.add().ParseFromString(signed)
        return roster.SerializeToString()

    def digest(self) -> bytes:
        """SHA-256 of `to_bytes`: equal for those who know the same."""
        return hashlib.sha256(self.to_bytes()).digest()

    def check(self, shown: Certificate, now: float) -> Certificate:
        """The certificate that counts for the member who shows `shown`: that, or a newer one. Raises `Refused`."""
        if shown.key in self.revoked:
            raise Refused(Refusal.REVOKED)
        known = self.members.get(shown.key, shown)
        usable = [one for one in (known, shown) if not self._has_revoked(one.issuers)]
        if not usable:
            raise Refused(Refusal.ISSUER_REVOKED)
        best = max(usable, key=lambda one: one.issued)
        if best.expires <= now:
            raise Refused(Refusal.EXPIRED)
        if best.key in self._late:
            raise Refused(Refusal.TOO_LATE)
        return best

    def used(self, invitation: Invitation) -> set[bytes]:
        """The keys of the members that came by `invitation`."""
        return {key for key, member in self.members.items() if member.invitation == invitation.id}

    def certified_by(self, admin: bytes) -> list[Certificate]:
        """The members whose certificates would be worth nothing without the admin with the key `admin`."""
        return [one for key, one in self.members.items() if admin in one.issuers and key not in self.revoked]

    def host_of(self, member: Certificate) -> bytes:
        """The key of the admin by whose invitation a member came, as far as that is known; empty: the root's."""
        invitation = self.invitations.get(member.invitation)
        return (*(invitation or member).issuers, b"")[0]

    def _take(self, statement: Statement) -> bool:
        """Whether it is news. What a revoked admin says is not heard; what was heard of him before stands."""
        if isinstance(statement, Process) or self._has_revoked(statement.issuers):
            return False
        if isinstance(statement, Revocation):
            return _put(self.revoked, statement.key, statement, _revocation_rank)
        if self._is_full:
            return False
        if isinstance(statement, Certificate):
            return _put(self.members, statement.key, statement, _certificate_rank)
        return _put(self.invitations, statement.id, statement, _invitation_rank)

    @property
    def _is_full(self) -> bool:
        return len(self.members) + len(self.revoked) + len(self.invitations) >= MAX_STATEMENTS

    def _has_revoked(self, keys: Iterable[bytes]) -> bool:
        return any(key in self.revoked for key in keys)

    def _find_late(self) -> None:
        """Of those who came by one invitation, as many as it has uses count: the first."""
        self._late = set()
        for invitation in self.invitations.values():
            came = sorted(self.used(invitation), key=lambda key: (self.members[key].admitted, key))
            self._late.update(came[invitation.uses :])

    def _drop(self, now: float) -> None:
        for key, member in list(self.members.items()):
            invitation = self.invitations.get(member.invitation)
            is_open = invitation is not None and invitation.expires > now  # and this member has had one of its uses
            if member.expires < now - _FORGOTTEN and not is_open:
                del self.members[key]
        for name, invitation in list(self.invitations.items()):
            if invitation.expires < now - _UNUSED and not self.used(invitation):
                del self.invitations[name]


def _time(statement: Statement) -> int:
    if isinstance(statement, Certificate):
        return statement.issued
    return statement.time if isinstance(statement, Revocation) else 0


def _put(shelf: dict[K, T], key: K, new: T, rank: Callable[[T], Any]) -> bool:
    old = shelf.get(key)
    if old is not None and rank(new) <= rank(old):
        return False
    shelf[key] = new
    return True


def _certificate_rank(one: Certificate) -> Any:
    return one.issued, one.expires, one.signed


def _revocation_rank(one: Revocation) -> Any:
    return one.time, one.signed


def _invitation_rank(one: Invitation) -> Any:
    return one.cancelled, one.signed
