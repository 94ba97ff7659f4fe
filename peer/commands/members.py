"""`peer join`, `peer members`, `peer revoke`: who is in a private swarm."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from bootstrap.options import SwarmName
from peer.commands.process import run
from peer.commands.swarm import Json, MemberName, own_name, private_swarm
from protocol.errors import BadUsage, SwarmError
from protocol.machine.terminal import new_console

if TYPE_CHECKING:
    from bootstrap.member import Member
    from bootstrap.membership.folder import Known, SwarmFolder
    from bootstrap.membership.own import OwnMembership
    from protocol.membership.certificate import Certificate


def join(
    ticket: Annotated[str, typer.Argument(help="The line that `peer invite` printed.")],
    name: MemberName = None,
    swarm: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="What this machine is to call the swarm.")
    ] = None,
) -> None:
    """Join a private swarm by a ticket."""
    from bootstrap.joining import redeem
    from bootstrap.membership.folder import check_name
    from bootstrap.membership.ticket import Ticket

    if swarm is not None:
        check_name(swarm)
    read, member_name = Ticket.from_text(ticket.removeprefix("ticket=")), own_name(name)

    async def work() -> None:
        folder = (await redeem(read, member_name)).keep(swarm)
        print(f"joined swarm={folder.name} role={folder.certificate().role.name.lower()}")

    run(work())


def members(swarm: SwarmName = None, as_json: Json = False) -> None:
    """Who is in a private swarm, in which role, and when he was seen last."""
    from bootstrap.membership.own import OwnMembership

    folder = private_swarm(swarm)

    async def work() -> None:
        async with _visit(folder):
            rows = _rows(OwnMembership(folder, ""), folder.known)
        if as_json:
            print(json.dumps(rows, indent=2))
        else:
            new_console().print(_table(rows))

    run(work())


def revoke(
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="Its name or ID, as `peer members` shows them.")],
    swarm: SwarmName = None,
) -> None:
    """Put a member out of a private swarm: everywhere within a minute."""
    from bootstrap.membership.own import OwnMembership
    from protocol.membership.certificate import Role

    folder = private_swarm(swarm)
    ours = OwnMembership(folder, "")
    ours.check_own(Role.ADMIN)

    async def work() -> None:
        async with _visit(folder) as visitor:  # the newest roster: who is to be put out may be new
            ours.refresh()
            out = _find(ours, member)
            if out.key == ours.member.key:
                raise BadUsage("That is this machine: another admin must put it out, or use `peer swarm forget` here.")
            stay, told = ours.put_out(out), 0
            if visitor is not None and visitor.membership is not None and visitor.rounds is not None:
                visitor.membership.refresh()
                told = await visitor.rounds.tell_all()
        print(f"revoked member={out.id} told={told}")
        typer.echo(f"{out.name} is out: {told} process(es) know already, all others within a minute.", err=True)
        if stay:
            names = ", ".join(one.name for one in stay)
            typer.echo(f"It had let in {names}, who stay; put out whom you do not know.", err=True)

    run(work())


@asynccontextmanager
async def _visit(folder: "SwarmFolder") -> "AsyncIterator[Member | None]":
    """The swarm for a moment: who is up is written down in the folder. None where nobody answers, which is said."""
    from bootstrap.member import Member, MemberOptions

    try:
        visitor = await Member.join(MemberOptions(client_mode=True, swarm=folder))
    except SwarmError as error:
        typer.echo(f"What is known here is from before: {error}", err=True)
        yield None
        return
    try:
        if visitor.rounds is not None:
            await visitor.rounds.spread()
        await visitor.look_around()
        yield visitor
    finally:
        await visitor.shutdown()


def _rows(ours: "OwnMembership", known: "dict[str, Known]") -> list[dict[str, Any]]:
    from protocol.membership.refusals import Refused

    rows = []
    everyone = {ours.member.key: ours.member, **ours.roster.members}
    for one in sorted(everyone.values(), key=lambda one: (-one.role, one.name)):
        seen = [process for process in known.values() if process.member == one.id]
        try:
            ours.roster.check(one, time.time())
            state = "member"
        except Refused as refused:
            state = refused.why.name.lower().replace("_", " ")
        latest = max(seen, key=lambda process: process.seen, default=None)
        rows.append(
            {
                "name": one.name,
                "id": one.id,
                "role": one.role.name.lower(),
                "state": state,
                "let_in_by": _name(ours, ours.roster.host_of(one)),
                "expires": one.expires,
                "seen": latest.seen if latest else None,
                "version": latest.version if latest else "",
                "this": one.key == ours.member.key,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("name", "ID", "role", "state", "let in by", "expires", "last seen", "version"):
        table.add_column(column, overflow="fold")
    now = time.time()
    for row in rows:
        cells = (
            row["name"] + (" (this machine)" if row["this"] else ""),
            row["id"],
            row["role"],
            row["state"],
            row["let_in_by"],
            time.strftime("%Y-%m-%d", time.localtime(row["expires"])),
            _ago(now - row["seen"]) if row["seen"] is not None else "",
            row["version"],
        )
        table.add_row(*map(Text, cells))  # others' text: no markup
    return table


def _name(ours: "OwnMembership", key: bytes) -> str:
    from protocol.membership.certificate import name_of

    known = {ours.member.key: ours.member, **ours.roster.members}.get(key)
    return known.name if known else name_of(key) if key else "root"


def _ago(seconds: float) -> str:
    if seconds < 60:
        return "now"
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit} ago"
    return "now"


def _find(ours: "OwnMembership", wanted: str) -> "Certificate":
    found = [one for one in ours.roster.members.values() if wanted in (one.name, one.id) or one.id.startswith(wanted)]
    exact = [one for one in found if one.id == wanted] or found
    standing = [one for one in exact if one.key not in ours.roster.revoked] or exact
    if len(standing) != 1:
        names = ", ".join(sorted(f"{one.name} ({one.id})" for one in (standing or ours.roster.members.values())))
        raise BadUsage(f"{wanted!r} fits {len(standing)} members; name one of these by its ID: {names}.")
    return standing[0]
