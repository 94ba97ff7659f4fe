"""What members ask each other about membership: letting in, renewing, comparing rosters.

Letting in is asked by those who are no members yet, so it does not pass the gate:

    joiner                                          member
      Join{version, invitation's ID, time}     ->
                                               <-     Joined{its certificate, ...}; a refusal, or where admins are
      (the certificate is one of the root that the ticket names, and of this peer ID)
      Join{..., Redeem{secret, key, ...}}      ->
                                               <-     Joined{Grant{the swarm's secret, a certificate, ...}}

The joiner tells the secret to nobody but an admin of the ticket's root; k3s does it like this, where a token begins
with the hash of the cluster's authority. Who does not name a known invitation is shown nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, P2PContext

from bootstrap.membership.gate import Bytes, Gate
from bootstrap.membership.own import OwnMembership
from bootstrap.membership.rounds import RENEW, SYNC, Rounds
from bootstrap.membership.ticket import hash_secret
from protocol.errors import SwarmError
from protocol.membership import membership_pb2 as pb
from protocol.membership.certificate import (
    MAX_NAME,
    BadStatement,
    Certificate,
    Invitation,
    Process,
    Role,
    has_signed,
    read_statement,
)
from protocol.membership.refusals import Refusal, Refused
from protocol.name import NAME

VERSION = 1
"""Of what a joiner and a member say to each other."""
JOIN = f"{NAME}.membership.join"
MAX_CLOCK_DIFFERENCE = 3.0
"""Seconds; more than these, and the directory's records would be refused."""
_MAX_JOIN_BYTES = 4096
_RENEWED_AFTER = 4
"""The part of its lifetime, one over this, after which a certificate is renewed at the earliest."""
_REDEEM_CONTEXT = f"{NAME} redeem 1\0".encode()
_log = logging.getLogger(__name__)


class Desk:
    """Answers what others ask about membership."""

    def __init__(self, membership: OwnMembership, rounds: Rounds, addresses: Callable[[], Sequence[str]]):
        """`addresses`: this process's own."""
        self._ours, self._rounds, self._addresses = membership, rounds, addresses
        self._redeeming = asyncio.Lock()
        self._spreading: asyncio.Task[None] | None = None

    async def open(self, p2p: P2P, gate: Gate) -> None:
        """Answer from now on, strangers included."""
        await p2p.add_protobuf_handler(JOIN, self._join, Bytes)
        await self.open_to_members(gate)

    async def open_to_members(self, gate: Gate) -> None:
        """Answer members from now on."""
        await gate.add_protobuf_handler(SYNC, self._sync, pb.Sync)
        await gate.add_protobuf_handler(RENEW, self._renew, pb.Renew)

    async def _sync(self, asked: pb.Sync, context: P2PContext) -> pb.Sync:
        if self._ours.merge(asked.news.SerializeToString()):
            self._spreading = asyncio.create_task(self._rounds.spread())
        answer = pb.Sync(digest=self._ours.roster.digest())
        if answer.digest != asked.digest:
            answer.news.ParseFromString(self._ours.roster.to_bytes())
        return answer

    async def _renew(self, asked: pb.Renew, context: P2PContext) -> pb.Renewed:
        try:
            signer = self._ours.signer()
            standing = self._ours.standing(context.remote_id.to_base58(), asked.process.SerializeToString())
            member = standing.now()
        except (SwarmError, Refused):
            return pb.Renewed()
        now, lifetime, renewed = int(time.time()), member.expires - member.issued, member.signed
        if now - member.issued > lifetime // _RENEWED_AFTER:  # or a member could keep everyone busy with renewals
            renewed = signer.certify(
                member.key, member.role, member.name, now, lifetime, member.invitation, member.admitted
            )  # fmt: skip
            self._ours.learn([renewed])
        return pb.Renewed(certificate=pb.Signed.FromString(renewed))

    async def _join(self, data: Bytes, context: P2PContext) -> Bytes:
        """What a stranger asks. Whatever it sends, it gets a sentence or what its invitation is good for."""
        answer = pb.Joined(version=VERSION)
        try:
            asked = pb.Join.FromString(data[:_MAX_JOIN_BYTES])
        except DecodeError:
            answer.refusal = "That is no request to join a swarm."
            return Bytes(answer.SerializeToString())
        invitation = self._ours.roster.invitations.get(asked.invitation)
        if asked.version != VERSION:
            answer.refusal = (
                f"The two machines join in other ways (version {asked.version} and {VERSION}); update the older of the "
                f"two {NAME}."
            )
        elif invitation is None:
            answer.refusal = "The ticket is not known here: it is of another swarm, or was forgotten long ago."
        else:
            answer.process.ParseFromString(self._ours.certificate())
            answer.refusal = _problem(invitation, asked.time)
            if not answer.refusal:
                await self._let_in(answer, asked, invitation, context)
            if answer.refusal:
                _log.warning("A machine that wanted to join %s was refused: %s", self._ours.folder.name, answer.refusal)
        return Bytes(answer.SerializeToString())

    async def _let_in(self, answer: pb.Joined, asked: pb.Join, invitation: Invitation, context: P2PContext) -> None:
        try:
            self._ours.check_own(Role.ADMIN)
        except SwarmError:
            answer.admins.extend(self._admins())
            if not answer.admins:
                answer.refusal = "No admin of the swarm is up, and only admins can let in; try again later."
            return
        if not asked.HasField("redeem"):
            return
        async with self._redeeming:
            await self._redeem(answer, asked.redeem, invitation, context)

    async def _redeem(self, answer: pb.Joined, asked: pb.Redeem, invitation: Invitation, context: P2PContext) -> None:
        signed = redeem_signature_data(asked.secret, context.remote_id.to_base58(), self._ours.peer_id)
        is_printable = asked.name.isprintable() and 0 < len(asked.name) <= MAX_NAME
        if hash_secret(asked.secret) != invitation.id or not has_signed(asked.key, signed, asked.signature):
            answer.refusal = "The ticket's secret is wrong; copy the whole line that `peer invite` printed."
            return
        if not is_printable or asked.key in self._ours.roster.revoked:
            answer.refusal = f"A member needs a name of at most {MAX_NAME} printable characters, and a key of its own."
            return
        used = self._ours.roster.used(invitation)
        if asked.key in used:
            certificate = self._ours.roster.members[asked.key]  # our first answer got lost
        elif len(used) >= invitation.uses:
            answer.refusal = _used_up(invitation)
            return
        else:
            certificate = self._certify(asked, invitation)
            await self._rounds.tell_all()  # another admin may be letting somebody in by the same invitation
        try:
            self._ours.roster.check(certificate, time.time())
        except Refused as refused:
            answer.refusal = (
                _used_up(invitation) if refused.why is Refusal.TOO_LATE else refused.why.sentence("the new member")
            )
            return
        _log.info("%s joined %s as %s", certificate.name, self._ours.folder.name, certificate.role.name.lower())
        grant = answer.grant
        grant.swarm, grant.secret = self._ours.folder.name, self._ours.folder.secret_bytes
        grant.certificate.ParseFromString(certificate.signed)
        grant.roster.ParseFromString(self._ours.roster.to_bytes())
        grant.addresses.extend([*self._addresses(), *self._ours.folder.addresses(without=[self._ours.peer_id])][:20])

    def _certify(self, asked: pb.Redeem, invitation: Invitation) -> Certificate:
        signed = self._ours.signer().certify(
            asked.key, invitation.role, asked.name, int(time.time()), invitation.lifetime, invitation.id
        )
        self._ours.learn([signed])
        certificate = read_statement(self._ours.root, signed)
        assert isinstance(certificate, Certificate)
        return certificate

    def _admins(self) -> list[str]:
        """Addresses of admins that were seen of late."""
        admins = {one.id for one in self._ours.roster.members.values() if one.role >= Role.ADMIN}
        known = self._ours.folder.known.values()
        return [address for process in known if process.member in admins for address in process.addresses][:20]


def redeem_signature_data(secret: bytes, joiner: str, admin: str) -> bytes:
    """What the new member's key signs: so that nobody has a key certified that is not its own."""
    return b"\0".join((_REDEEM_CONTEXT, secret, joiner.encode(), admin.encode()))


def process_in(root: bytes, signed: pb.Signed, peer_id: str, now: float) -> Certificate | None:
    """Whose process `peer_id` is, if `signed` says so in the name of the swarm with the key `root`."""
    try:
        found = read_statement(root, signed.SerializeToString())
    except BadStatement:
        return None
    is_it = isinstance(found, Process) and found.peer_id == peer_id and found.member.expires > now
    return found.member if isinstance(found, Process) and is_it else None


def _problem(invitation: Invitation, their_time: float) -> str:
    """Why nobody can join by an invitation now; empty: nothing."""
    now = time.time()
    if not abs(their_time - now) <= MAX_CLOCK_DIFFERENCE:
        return (
            f"The clocks of the two machines differ by {abs(their_time - now):.0f} s; set both, by NTP for instance, "
            "and join again."
        )
    if invitation.cancelled:
        return "The ticket has been cancelled; ask for another (`peer invite`)."
    if invitation.expires <= now:
        return "The ticket has expired; ask for another (`peer invite`)."
    return ""


def _used_up(invitation: Invitation) -> str:
    times = "once" if invitation.uses == 1 else f"{invitation.uses} times"
    return f"The ticket was good for joining {times}, and has been used up; ask for another (`peer invite`)."
