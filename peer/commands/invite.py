"""`peer invite`: tickets by which other machines join a private swarm."""

import re
import secrets
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from bootstrap.options import SwarmName
from peer.commands.process import run
from peer.commands.swarm import private_swarm
from protocol.errors import BadUsage, SwarmError

if TYPE_CHECKING:
    from bootstrap.membership.folder import SwarmFolder
    from bootstrap.membership.own import OwnMembership
    from protocol.membership.certificate import Invitation, Role

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_OFFERED_USES, _OFFERED_SECONDS = 8, 3600
"""Of the ticket that `peer serve` shows: enough for those who are about to join."""
_MAX_USES = 1000
_MAX_SECONDS = 365 * 86_400


def invite(
    swarm: SwarmName = None,
    role: Annotated[str, typer.Option(help="What those may do who join by it: use, serve or admin.")] = "serve",
    uses: Annotated[int, typer.Option(min=1, max=_MAX_USES, help="Machines that may join by it.")] = 1,
    expires: Annotated[str, typer.Option(help="How long the ticket is good: 30m, 1h, 7d.")] = "1h",
    lasts: Annotated[str | None, typer.Option(help="How long a membership holds until it is renewed: 30d.")] = None,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Cancel the ticket with this ID instead.")] = None,
) -> None:
    """Print a ticket: one line by which another machine joins a private swarm."""
    from bootstrap.membership.own import OwnMembership
    from protocol.membership.certificate import ADMIN_LIFETIME, LIFETIME, Role

    seconds = parse_time("--expires", expires)
    lifetime = parse_time("--lasts", lasts) if lasts is not None else LIFETIME
    folder = private_swarm(swarm)
    ours = OwnMembership(folder, "")
    ours.check_own(Role.ADMIN)
    if cancel is not None:
        run(_cancel(ours, cancel))
        return
    try:
        wanted = Role[role.upper()]
    except KeyError as error:
        raise BadUsage(f"--role {role} is none; expected use, serve or admin.") from error
    ticket, name = make_ticket(ours, wanted, uses, seconds, ADMIN_LIFETIME if wanted is Role.ADMIN else lifetime)
    print(f"ticket={ticket}", flush=True)
    _explain(ticket, name, f"{uses} machine(s), as {role}, within {expires}")
    run(_tell(folder))


def make_ticket(ours: "OwnMembership", role: "Role", uses: int, seconds: int, lifetime: int) -> tuple[str, str]:
    """A new invitation: the ticket, and the ID by which it can be cancelled. Raises `BadUsage`, `NotAllowed`."""
    from bootstrap.membership.ticket import SECRET_BYTES, Ticket, hash_secret

    signer, secret = ours.signer(), secrets.token_bytes(SECRET_BYTES)
    addresses = _addresses(ours)
    if not addresses:
        raise BadUsage(
            f"A ticket names machines of the swarm, and none has run yet: start `peer serve MODEL --swarm "
            f"{ours.folder.name}` or `peer bootstrap --swarm {ours.folder.name}` first."
        )
    # Whole minutes travel in a ticket, and it must not say more than the invitation.
    deadline = -(-(int(time.time()) + seconds) // 60) * 60
    ours.learn([signer.invite(hash_secret(secret), role, uses, deadline, lifetime)])
    return Ticket(ours.root, secret, deadline, tuple(addresses)).to_text(), hash_secret(secret).hex()[:8]


def offer_invitation(ours: "OwnMembership") -> None:
    """Show on stderr how others join a swarm in which this machine is an admin.

    A ticket in a log would be one too many: on a terminal only, or while nobody has joined.
    """
    from protocol.membership.certificate import LIFETIME, Role

    if len(ours.roster.members) > 1 and not sys.stderr.isatty():
        return
    with suppress(SwarmError):
        ticket, name = make_ticket(ours, Role.SERVE, _OFFERED_USES, _OFFERED_SECONDS, LIFETIME)
        _explain(ticket, name, f"up to {_OFFERED_USES} machines, as serve, within 1h")


async def tell_others(folder: "SwarmFolder") -> int:
    """Bring what this machine knows to the members that are up; how many have heard it."""
    from bootstrap.member import Member, MemberOptions

    try:
        member = await Member.join(MemberOptions(client_mode=True, swarm=folder))
    except SwarmError:
        return 0
    try:
        return await member.rounds.tell_all() if member.rounds is not None else 0
    finally:
        await member.shutdown()


def parse_time(option: str, text: str) -> int:
    """Seconds in 30s, 30m, 1h, 7d. Raises `BadUsage`."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= _MAX_SECONDS:
        raise BadUsage(f"{option} {text} is no time; expected 30m, 1h, 7d or the like, up to 365d.")
    return seconds


async def _tell(folder: "SwarmFolder") -> None:
    """So that admins elsewhere know the ticket too; here it is known by now."""
    await tell_others(folder)


async def _cancel(ours: "OwnMembership", name: str) -> None:
    found = [one for one in ours.roster.invitations.values() if name and one.id.hex().startswith(name.lower())]
    if len(found) != 1:
        known = ", ".join(sorted(one.id.hex()[:8] for one in _open(ours))) or "none"
        raise BadUsage(f"--cancel {name} fits {len(found)} tickets; those that are open: {known}.")
    [one] = found
    ours.learn([ours.signer().invite(one.id, one.role, one.uses, one.expires, one.lifetime, cancelled=True)])
    told = await tell_others(ours.folder)
    print(f"cancelled ticket={one.id.hex()[:8]} told={told}")


def _open(ours: "OwnMembership") -> "list[Invitation]":
    now = time.time()
    return [one for one in ours.roster.invitations.values() if not one.cancelled and one.expires > now]


def _addresses(ours: "OwnMembership") -> list[str]:
    """Where to join: by this machine's processes, by other admins', by others that know where admins are."""
    from bootstrap.membership.packed import fits
    from protocol.membership.certificate import Role

    admins = {one.id for one in ours.roster.members.values() if one.role >= Role.ADMIN}
    known = sorted(ours.folder.known.values(), key=lambda one: (one.member != ours.member.id, one.member not in admins))
    return [address for process in known for address in process.addresses if fits(address)]


def _explain(ticket: str, name: str, what: str) -> None:
    command = f"peer join {ticket}"
    print(
        f"To join, on another machine ({what}; cancel: `peer invite --cancel {name}`):\n\n    {command}\n",
        file=sys.stderr,
    )
    if sys.stderr.isatty():
        import segno

        segno.make(command, error="l").terminal(out=sys.stderr, compact=True)
