"""This process as a member of a private swarm: what it shows, and how others stand with it."""

import logging
import time
from collections.abc import Callable, Iterable

from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.roster import Roster
from protocol.errors import NotAllowed
from protocol.membership.certificate import BadStatement, Certificate, Process, Role, Signer, read_statement
from protocol.membership.refusals import Refusal, Refused
from protocol.membership.secret import SwarmSecret

_log = logging.getLogger(__name__)


class OwnMembership:
    """The membership of the process with the peer ID `peer_id`.

    Several processes of a machine share a folder, and so what they learn: see `refresh`.
    """

    def __init__(self, folder: SwarmFolder, peer_id: str):
        """Raises `BadUsage` for a folder that cannot be used."""
        self.folder, self.root = folder, folder.root
        self.secret: SwarmSecret = folder.secret
        self.peer_id = peer_id
        self.changed: list[Callable[[], None]] = []
        """Called when members may have come, gone, or changed."""
        self.roster = Roster(self.root, folder.read_roster())
        self._version = folder.version()
        self._member = folder.certificate()
        self._process = self._certify()
        self.learn([self._member.signed])

    @property
    def member(self) -> Certificate:
        """This member's certificate."""
        return self._member

    def signer(self, role: Role = Role.ADMIN) -> Signer:
        """This member, if it has `role` at least. Raises `NotAllowed`, and `NotAMember` when it is out."""
        self.check_own(role)
        return Signer(self.folder.key, self._member)

    def check_own(self, role: Role) -> None:
        """Raises `NotAllowed` when this member has less than `role`, and `NotAMember` when it is out."""
        try:
            self.roster.check(self._member, time.time())
        except Refused as refused:
            raise refused.why.error() from None
        if self._member.role < role:
            raise NotAllowed(
                f"This machine's role in the swarm {self.folder.name} is {self._member.role.name.lower()}, and this "
                f"takes {role.name.lower()}: join again with a ticket of `peer invite --role {role.name.lower()}`."
            )

    def put_out(self, member: Certificate) -> list[Certificate]:
        """Revoke a member's certificate. Returns those whom it had let in, who stay: they get certificates of ours.

        Raises `NotAllowed`, also when it is among those who vouch for this machine, and `NotAMember` as `signer`.
        """
        signer, orphans, now = self.signer(), self.roster.certified_by(member.key), int(time.time())
        if member.key in self._member.issuers:
            raise NotAllowed(
                f"{member.name} has let this machine in, which would be out with it: another admin must put it out, or "
                "one that the root key makes (`peer swarm recover`)."
            )
        said = [signer.revoke(member.key, now)]
        # What the one who is out has said before counts for nothing with those who did not hear it in time.
        said += [
            signer.revoke(one.key, max(now, one.time + 1))
            for one in self.roster.revoked.values()
            if member.key in one.issuers
        ]
        for one in orphans:
            issued, lifetime = max(now, one.issued + 1), one.expires - one.issued
            said.append(signer.certify(one.key, one.role, one.name, issued, lifetime, one.invitation, one.admitted))
        guests = [one for one in self.roster.members.values() if self.roster.host_of(one) == member.key]
        self.learn(said)
        return [
            one for one in {one.key: one for one in (*orphans, *guests)}.values() if one.key not in self.roster.revoked
        ]

    def certificate(self) -> bytes:
        """That of this process's peer ID."""
        return self._process

    def standing(self, peer_id: str, certificate: bytes) -> "MemberStanding":
        """How `peer_id`, who shows a certificate, stands. Raises `Refused`."""
        try:
            process = read_statement(self.root, certificate)
        except BadStatement:
            raise Refused(Refusal.OTHER_SWARM) from None
        if not isinstance(process, Process) or process.peer_id != peer_id:
            raise Refused(Refusal.OTHER_PROCESS)
        standing = MemberStanding(self, process.member, peer_id)
        standing.now()
        return standing

    def learn(self, statements: Iterable[bytes]) -> bool:
        """Take note of statements, for this machine's other processes too. Returns whether any was new."""
        return self._merge(lambda roster: roster.add(statements))

    def merge(self, roster: bytes) -> bool:
        """Take note of another roster, or a part of one; see `learn`."""
        return self._merge(lambda ours: ours.merge(roster))

    def refresh(self) -> bool:
        """Take note of what other processes of this machine have learned. Returns whether there was anything new."""
        version = self.folder.version()
        if version == self._version:
            return False
        self._version = version
        news = self.roster.merge(self.folder.read_roster())
        return self._renew_own() or news

    def _merge(self, merge: Callable[[Roster], bool]) -> bool:
        if not merge(self.roster):
            return False
        with self.folder.lock():
            self.roster.merge(self.folder.read_roster())
            self.folder.save_roster(self.roster.to_bytes())
        self._version = self.folder.version()
        self._renew_own()
        return True

    def _renew_own(self) -> bool:
        """Use the newest certificate of this member that is known; tell those who wait for changes."""
        newest = self.roster.members.get(self.folder.key.public)
        renewed = newest is not None and newest.issued > self._member.issued
        if newest is not None and renewed:
            self._member = newest
            self._process = self._certify()
            self.folder.save_certificate(newest)
            self._version = self.folder.version()
        for call in self.changed:
            call()
        return renewed

    def _certify(self) -> bytes:
        return Signer(self.folder.key, self._member).certify_process(self.peer_id)


class MemberStanding:
    """How a process of another member stands, now."""

    def __init__(self, ours: OwnMembership, shown: Certificate, peer_id: str):
        self._ours, self._shown = ours, shown
        self.peer_id = peer_id

    @property
    def role(self) -> int:
        """See `Role`. Raises as `check`."""
        self.check()
        return self.now().role

    def now(self) -> Certificate:
        """The certificate that counts. Raises `Refused`."""
        return self._ours.roster.check(self._shown, time.time())

    def check(self) -> None:
        """Raises `NotAMember` when the member is out."""
        try:
            self.now()
        except Refused as refused:
            who = f"{self._shown.name!r} ({self._shown.id})"
            raise refused.why.error(who) from None
