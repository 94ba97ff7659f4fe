"""Checks of the network: whether others can reach this machine, multicast, NAT."""

import asyncio
import os
from collections.abc import Iterable
from ipaddress import ip_address

import base58
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import ip_of, parts_of
from bootstrap.discovery.discovery import Discovery
from bootstrap.discovery.networks import Interface, own_interfaces
from bootstrap.member import Member
from peer.doctor.case import Case, own_hosts
from peer.doctor.check import Finding, Findings, ok, warning, wrong
from protocol.errors import SwarmError
from protocol.membership.certificate import Role
from protocol.membership.secret import SECRET_BYTES, SwarmSecret
from protocol.transport.dial_back import Attempt, Outcome

_HELPERS = 3
"""Members that are asked to dial back over one address family, until one does."""
_FAMILIES = {4: "IPv4", 6: "IPv6"}
_PORTS = {"libp2p": "libp2p's port", "direct": "the port for direct connections"}
_OPTIONS = {"libp2p": "--port", "direct": "--direct-port"}
_FAILED = {
    Outcome.REFUSED: "the connection was refused",
    Outcome.SILENT: "nothing came through",
    Outcome.NO_WAY: "no network leads here from there",
    Outcome.ANOTHER: "another machine or program answers",
}
_HEARING = 4.0
"""Seconds in which a multicast must be heard."""


async def dial_back(case: Case) -> Findings:
    """Whether another member can reach this machine, over each address family and carrier."""
    member = await case.join()
    if member is None or not member.others:
        return [ok("There is no member that could be asked to dial this machine.")]
    try:
        places = await case.places()
    except SwarmError as error:
        return [warning(f"The members' addresses could not be looked up: {error}")]
    found: list[Finding] = []
    for family in member.ports:
        helpers = _helpers(places, family)
        if helpers:
            found += await _dialled_by_one(case, member, family, helpers)
    return found or [warning("No member has an address by which this machine could meet it anew.")]


def _helpers(places: dict[str, list[Multiaddr]], family: int) -> dict[str, list[Multiaddr]]:
    """Whom to ask over an address family, those of other machines first."""
    usable = {peer_id: [one for one in known if _leads(one, family)] for peer_id, known in places.items()}
    is_here = {peer_id: any(ip_of(one) in own_hosts() for one in known) for peer_id, known in usable.items()}
    asked = sorted((peer_id for peer_id, known in usable.items() if known), key=lambda peer_id: is_here[peer_id])
    return {peer_id: usable[peer_id] for peer_id in asked[:_HELPERS]}


def _leads(place: Multiaddr, family: int) -> bool:
    """Whether a place can be reached over an address family, by what this machine has of that."""
    ip = ip_of(place)
    if ip is None or ip.version != family or "p2p-circuit" in parts_of(place):
        return False
    return ip.is_loopback or any(
        own.version == family and not own.is_loopback and not own.is_link_local for own in own_hosts()
    )


async def _dialled_by_one(
    case: Case, member: Member, family: int, helpers: dict[str, list[Multiaddr]]
) -> list[Finding]:
    problem, mend = "", "See whether this machine has an address of that family, and whether theirs is right."
    for peer_id, known in helpers.items():
        try:
            answer = await member.ask_to_dial_back(peer_id, known)
        except SwarmError as error:
            problem = str(error)
            continue
        if answer.too_often:
            problem, mend = f"Peer {peer_id} was asked too often.", "Run this again in a minute."
        elif attempts := [one for one in answer.attempts if ip_address(one.host).version == family]:
            return _said(case, member, _FAMILIES[family], attempts, any(ip_of(one) in own_hosts() for one in known))
        else:
            problem = f"Peer {peer_id} sees this machine through a relay only."
    return [warning(f"Over {_FAMILIES[family]} nobody has dialled back: {problem}", mend)]


def _said(case: Case, member: Member, family: str, attempts: list[Attempt], is_near: bool) -> list[Finding]:
    """`is_near`: by a member on this machine."""
    case.seen_as |= {attempt.host for attempt in attempts}
    certificate = member.membership.member if member.membership is not None else None
    serves = certificate is None or certificate.role >= Role.SERVE
    return [_judged(family, one, serves, _port(member, one.carrier, one.host), is_near) for one in attempts]


def _judged(family: str, attempt: Attempt, serves: bool, port: int, is_near: bool) -> Finding:
    where = f"{_PORTS[attempt.carrier]}, {port}, at {attempt.host}"
    if attempt.outcome is Outcome.REACHED:
        aside = " (a member on this machine has tried, so nothing is known of firewalls)" if is_near else ""
        return ok(f"Over {family} others reach {where}{aside}.")
    sentence = f"Over {family} another member cannot reach {where}: {_FAILED[attempt.outcome]}."
    fixed = _OPTIONS[attempt.carrier]
    if ip_address(attempt.host) in own_hosts():
        mend = f"Open the port (TCP) in this machine's firewall; fix its number by {fixed}."
    else:
        mend = f"That address is a router's: forward the port (TCP) to this machine; fix its number by {fixed}."
    if not serves:
        return warning(sentence, f"Nothing need be done to use the swarm; to serve: {mend[0].lower()}{mend[1:]}")
    return wrong(sentence, mend)


def _port(member: Member, carrier: str, host: str) -> int:
    if carrier == "direct":
        return member.door.addresses[0][1] if member.door is not None else 0
    return member.ports[ip_address(host).version]


async def nat(case: Case) -> Findings:
    """Whether a router stands between this machine and others, and whether relays carry to it."""
    member = await case.join()
    routers = {host for host in case.seen_as if ip_address(host) not in own_hosts()}
    relayed = member is not None and any("p2p-circuit" in address for address in member.addresses)
    by_relay = "Others reach this machine through a relay, which is slower than directly."
    if not routers:
        if not case.seen_as:
            return [ok("Nobody has said under which address he sees this machine.")]
        direct = ok("Others see this machine under its own address: there is no NAT between.")
        return [direct, ok(by_relay)] if relayed else [direct]
    sentence = f"Others see this machine as {', '.join(sorted(routers))}, a router's address (NAT)."
    if relayed:
        return [ok(f"{sentence} {by_relay}")]
    mend = "Forward the ports in the router and --announce its address, or wait three minutes for a relay."
    return [warning(sentence, mend)]


async def multicast(case: Case) -> Findings:
    """Whether what this machine broadcasts on its networks is heard, by which members find each other."""
    folder = case.membership.swarm
    if folder is not None and not folder.discovery:
        return [ok("It is switched off: members are found by a ticket or by known addresses only.")]
    if not own_interfaces():
        return [warning("This machine has no address in any network.", "Connect it to one.")]
    if not await _is_heard():
        return [warning("This machine does not hear its own multicast.", f"Let UDP port 5353 pass. {_WITHOUT}")]
    return [ok("It is sent and heard on this machine; a Wi-Fi for guests may still keep it from others.")]


_WITHOUT = "Without it members are found by a ticket or by known addresses only."


async def _is_heard() -> bool:
    """Whether a member of a swarm that nobody else is in, on this machine, finds another."""
    secret, heard = SwarmSecret(os.urandom(SECRET_BYTES)), asyncio.Event()
    speaker = base58.b58encode(b"\x12\x20" + os.urandom(32)).decode()

    def say(interfaces: Iterable[Interface]) -> list[str]:
        return [f"/ip{one.version}/{one.ip}/tcp/9/p2p/{speaker}" for one in interfaces]

    both = (Discovery(secret, say, lambda found: None), Discovery(secret, lambda _: [], lambda found: heard.set()))
    runs = [asyncio.create_task(one.run()) for one in both]
    try:
        await asyncio.wait_for(heard.wait(), _HEARING)
    except TimeoutError:
        return False
    finally:
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
    return True
