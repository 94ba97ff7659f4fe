"""Joining a private swarm by a ticket: from a machine that is no member yet to its folder."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import split_peer_address
from bootstrap.daemon import Connection
from bootstrap.identity import Identity
from bootstrap.member import JOIN_TIMEOUT, MemberOptions, quiet_hivemind, start_daemon
from bootstrap.membership.desk import JOIN, VERSION, process_in, redeem_signature_data
from bootstrap.membership.folder import Known, SwarmFolder, open_swarm, swarm_names
from bootstrap.membership.gate import Bytes
from bootstrap.membership.ticket import Ticket
from protocol.errors import BadUsage, NoSwarm, NotAMember, PeerUnreachable
from protocol.membership import membership_pb2 as pb
from protocol.membership.certificate import BadStatement, Certificate, Role, SigningKey, read_statement

_ANSWER_TIMEOUT = 8.0
"""Seconds for one answer: an admin may have to hear of others first."""


async def redeem(ticket: Ticket, member_name: str) -> "Redeemed":
    """What an admin of the ticket's swarm grants for it.

    Raises `NotAMember` when the ticket is refused, or who answers is no member of the swarm that it names, `NoSwarm`
    when nobody answers, `PeerFailed`.
    """
    quiet_hivemind()
    key = SigningKey.generate()
    async with AsyncExitStack() as resources:
        identity = Identity.load_or_create(None)
        resources.callback(identity.close)
        daemon = await start_daemon(MemberOptions(client_mode=True), identity)
        resources.push_async_callback(daemon.stop)
        p2p = await Connection.open(daemon.control)
        resources.push_async_callback(p2p.shutdown)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT):
                grant = await _Joiner(ticket, p2p, key, member_name).ask()
        except TimeoutError as error:
            raise NoSwarm(_nobody(ticket, "no answer in time")) from error
    return Redeemed(ticket, key, grant, _certificate(ticket.root, grant, key))


@dataclass(frozen=True)
class Redeemed:
    """A membership that this machine has been granted, and has not written down yet."""

    ticket: Ticket
    key: SigningKey
    grant: pb.Grant
    certificate: Certificate

    def keep(self, name: str | None) -> SwarmFolder:
        """Write it down, in place of an earlier membership in the same swarm. Raises `BadUsage`.

        `name`: what this machine is to call the swarm; None: what it called it before, or what the admin calls it.
        """
        for known in map(open_swarm, swarm_names()):
            if known.root == self.ticket.root:
                name = name or known.name
                known.forget()
        root, secret, roster = self.ticket.root, self.grant.secret, self.grant.roster.SerializeToString()
        name = name or _free_name(self.grant.swarm)
        folder = SwarmFolder.join(name, root, secret, self.key, self.certificate.signed, roster)
        seen = {
            peer_id.to_base58(): Known(
                member="", seen=time.time(), version="", addresses=tuple(f"{place}/p2p/{peer_id}" for place in places)
            )
            for peer_id, places in _by_peer([*self.grant.addresses, *self.ticket.addresses]).items()
        }
        folder.remember(seen)
        return folder


class _Joiner:
    """Asks the machines that a ticket names, and those that they name."""

    def __init__(self, ticket: Ticket, p2p: Connection, key: SigningKey, name: str):
        self._ticket, self._p2p, self._key, self._name = ticket, p2p, key, name

    async def ask(self) -> pb.Grant:
        """What the first admin who answers grants. Raises `NotAMember`, `NoSwarm`."""
        waiting, asked, problem = _by_peer(self._ticket.addresses), set[PeerID](), "no answer"
        while waiting:
            peer_id = next(iter(waiting))
            places = waiting.pop(peer_id)
            if peer_id in asked:
                continue
            asked.add(peer_id)
            try:
                await self._p2p.dial(peer_id, places)
                grant, admins = await self._ask_one(peer_id)
            except (P2PDaemonError, OSError, EOFError, TimeoutError, PeerUnreachable) as error:
                problem = str(error).strip().splitlines()[-1].strip(" *")[:200] if str(error).strip() else problem
                continue
            if grant is not None:
                return grant
            waiting |= _by_peer(admins)
        raise NoSwarm(_nobody(self._ticket, problem))

    async def _ask_one(self, peer_id: PeerID) -> tuple[pb.Grant | None, Sequence[str]]:
        """What one grants, or addresses of others. Raises `NotAMember` for a refusal, `PeerUnreachable`."""
        answer = await self._call(peer_id, pb.Join())
        member = process_in(self._ticket.root, answer.process, peer_id.to_base58(), time.time())
        if answer.HasField("process") and member is None:
            raise NotAMember(
                f"Who answers at the ticket's address ({peer_id}) is no member of the ticket's swarm; the secret was "
                "not told. Ask for another ticket, and how it came to you."
            )
        if answer.refusal:
            raise NotAMember(_printable(answer.refusal))
        if member is None or member.role < Role.ADMIN or answer.admins:
            return None, answer.admins[:20]
        secret, us, them = self._ticket.secret, self._p2p.peer_id.to_base58(), peer_id.to_base58()
        redeem = pb.Redeem(secret=secret, key=self._key.public, name=self._name)
        redeem.signature = self._key.sign(redeem_signature_data(secret, us, them))
        answer = await self._call(peer_id, pb.Join(redeem=redeem))
        if answer.refusal:
            raise NotAMember(_printable(answer.refusal))
        return (answer.grant if answer.HasField("grant") else None), answer.admins[:20]

    async def _call(self, peer_id: PeerID, question: pb.Join) -> pb.Joined:
        question.version, question.invitation, question.time = VERSION, self._ticket.invitation, time.time()
        async with asyncio.timeout(_ANSWER_TIMEOUT):
            data = await self._p2p.call_protobuf_handler(peer_id, JOIN, Bytes(question.SerializeToString()), Bytes)
        try:
            return pb.Joined.FromString(data)
        except DecodeError as error:
            raise PeerUnreachable(f"{peer_id} answers, but not as a member of a private swarm does") from error


def _certificate(root: bytes, grant: pb.Grant, key: SigningKey) -> Certificate:
    try:
        certificate = read_statement(root, grant.certificate.SerializeToString())
    except BadStatement as error:
        raise NotAMember("The admin who answered has sent a certificate that is none.") from error
    if not isinstance(certificate, Certificate) or certificate.key != key.public:
        raise NotAMember("The admin who answered has sent another member's certificate.")
    return certificate


def _free_name(wanted: str) -> str:
    """`wanted`, or with a number behind where this machine calls another swarm so."""
    taken = set(swarm_names())
    return next(
        name for number in range(1, 1000) if (name := f"{wanted}-{number}" if number > 1 else wanted) not in taken
    )


def _by_peer(addresses: Iterable[str]) -> dict[PeerID, list[Multiaddr]]:
    """Peer -> where it may be reached. What is no address is left out."""
    found: dict[PeerID, list[Multiaddr]] = defaultdict(list)
    for address in addresses:
        try:
            peer_id, place = split_peer_address(address)
        except BadUsage:
            continue
        found[peer_id].append(place)
    return found


def _nobody(ticket: Ticket, problem: str) -> str:
    places = ", ".join(address.partition("/p2p/")[0] for address in ticket.addresses)
    return (
        f"No admin of the ticket's swarm answers at {places} ({problem}); let `peer serve` or `peer bootstrap` run "
        "there, and see that this machine can reach it."
    )


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:500])
