"""Checks of this machine's standing with the swarm: who answers, clocks, the certificate, versions."""

import asyncio
import statistics
import time

from bootstrap.addresses import ip_of, parts_of, split_peer_address
from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.roster import Roster
from peer.doctor.case import Case
from peer.doctor.check import Finding, Findings, ok, warning, wrong
from protocol.errors import BadUsage, ClocksDiffer, NotAMember, PeerUnreachable, SwarmError
from protocol.membership.certificate import Role
from protocol.membership.refusals import Refused
from protocol.name import NAME, installed_version
from protocol.transport.dial_back import Outcome, reach

_BEARABLE, _ALARMING = 3.0, 1.0
"""Seconds by which clocks may differ, and from which on one should look after them."""
_ASKED = 8
"""Members whose clocks are read, and addresses that are tried."""
_SET_CLOCK = "Have both machines set their clocks by NTP (on Linux: `timedatectl set-ntp true`)."
_START = "Start a member there (`peer serve` or `peer bootstrap`)"
_UNREACHED = {
    Outcome.REACHED: "libp2p answers",
    Outcome.REFUSED: "the machine is there, but nothing listens at that port",
    Outcome.SILENT: "nothing answers: the machine is off, or a firewall keeps the connection out",
    Outcome.NO_WAY: "no network leads there from this machine",
    Outcome.ANOTHER: "something else than libp2p answers",
}


async def clock(case: Case) -> Findings:
    """This machine's, against other members'."""
    member = await case.join()
    says = f"This machine's clock says {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC"
    if isinstance(case.problem, ClocksDiffer):
        return [wrong(f"{says}; that of a member differs by more than {_BEARABLE:g} s.", _SET_CLOCK)]
    asked = (await case.others())[:_ASKED] if member is not None else []
    answers = await asyncio.gather(*map(member.clock_difference, asked), return_exceptions=True) if member else []
    differences = [answer for answer in answers if isinstance(answer, float)]
    if not differences:
        return [ok(f"{says}; there is no member's to compare it with.")]
    difference = statistics.median(differences)
    compared = f"{says}, {abs(difference):.1f} s {'behind' if difference > 0 else 'ahead of'} other members'"
    if abs(difference) > _BEARABLE:
        return [wrong(f"{compared}: records of this machine are refused.", _SET_CLOCK)]
    return [warning(f"{compared}.", _SET_CLOCK) if abs(difference) > _ALARMING else ok(f"{compared}.")]


async def swarm(case: Case) -> Findings:
    """Whether it answers."""
    if not case.names_swarm:
        mend = "Name one to have others looked at, too: --swarm, a TICKET, or --initial-peers with a member's address."
        return [warning("No swarm was named, and this machine has joined none.", mend)]
    await case.join()
    others, folder = await case.others(), case.membership.swarm
    if others:
        return [ok(f"{len(others)} other member(s) answer.")]
    problem = case.problem
    if isinstance(problem, NotAMember):
        mend = "Join with an admin's ticket (`peer invite`, `peer join TICKET`), or name the right swarm (--swarm)."
        return [wrong(str(problem), mend)]
    if isinstance(problem, ClocksDiffer):
        return [wrong("Members refuse this machine for its clock.", "Set the clock, see above.")]
    if problem is not None and not isinstance(problem, PeerUnreachable):
        return [wrong(str(problem), "See the other checks.")]
    if not case.named:
        return [
            warning(
                f"No other member of {folder.name if folder else 'the swarm'} has been seen yet, nor is one found now.",
                "Let others in (`peer invite`), or give the address of a member (--initial-peers).",
            )
        ]
    return [wrong("No other member answers.", _mend(folder)), *await asyncio.gather(*map(_try, case.named[:_ASKED]))]


def _mend(folder: SwarmFolder | None) -> str:
    where = "at one of the addresses below" if folder is None else "on any machine of the swarm"
    return f"Start a member {where} (`peer serve` or `peer bootstrap`); see below what is wrong with each address."


async def _try(address: str) -> Finding:
    try:
        place = split_peer_address(address)[1]
        parts, ip = parts_of(place), ip_of(place)
        host, port = str(ip or next(iter(parts.values()))), int(parts["tcp"])
    except (BadUsage, LookupError, ValueError):
        return warning(f"{address} is not tried: it is no address with a TCP port.")
    outcome = await reach(host, port)
    sentence = f"{host}, port {port}: {_UNREACHED[outcome]}."
    if outcome is Outcome.REACHED:
        return warning(sentence, "It is another member or swarm than the address names: ask for its new address.")
    if outcome is Outcome.REFUSED:
        return warning(sentence, f"{_START}, or ask for its new address: without --port it changes at each start.")
    if outcome is Outcome.SILENT:
        return warning(sentence, f"{_START}, and open the port (TCP) in that machine's firewall.")
    return warning(sentence, "See that both are in one network, or that a router leads from one to the other.")


async def certificate(case: Case) -> Findings:
    """This machine's, in a private swarm."""
    folder = case.membership.swarm
    if folder is None:
        return [ok("An open swarm has none.")]
    own, now = folder.certificate(), time.time()
    days = (own.expires - now) / 86_400
    holds = f"{own.name} is a member of {folder.name} in the role {own.role.name.lower()}"
    again = "Join with a new ticket (`peer invite` on an admin's machine, `peer join TICKET` here)."
    try:
        Roster(folder.root, folder.read_roster()).check(own, now)
    except Refused as refused:
        return [wrong(refused.why.sentence(), again)]
    if own.role < Role.ADMIN and now > (own.issued + 3 * own.expires) / 4:
        mend = "Let an admin's machine and this one be up at the same time for a minute: it is renewed then."
        return [warning(f"{holds}, for {days:.1f} days more: no admin was there to renew it.", mend)]
    return [ok(f"{holds}, for {days:,.0f} days more" + (", and is renewed in time." if days < 3650 else "."))]


async def versions(case: Case) -> Findings:
    """Those of other members, against this machine's."""
    own = installed_version()
    try:
        peers = {peer.peer_id: peer for found in (await case.models()).values() for peer in found}
        seen = {one.peer_id: one.version for one in await case.members()}
    except SwarmError as error:
        return [warning(f"The members' could not be looked up: {error}")]
    seen |= {peer_id: peer.version for peer_id, peer in peers.items()}
    others = {peer_id: version for peer_id, version in seen.items() if version and version != own}
    if not others:
        return [ok(f"This machine has {NAME} {own}" + (f", as have all {len(seen)} others." if seen else "."))]
    named = {peer_id: peer.name for peer_id, peer in peers.items()}
    listed = ", ".join(f"{named.get(peer_id) or peer_id}: {version}" for peer_id, version in sorted(others.items()))
    sentence = f"This machine has {NAME} {own}, others have another version ({listed})."
    return [warning(sentence, "Update the older ones.")]
