"""`peer swarm`: the private swarms that this machine knows."""

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bootstrap.options import as_path
from protocol.errors import BadUsage

if TYPE_CHECKING:
    from bootstrap.membership.folder import SwarmFolder

app = typer.Typer(no_args_is_help=True, help="The private swarms that this machine knows.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="What this machine calls the swarm.")]
MemberName = Annotated[str | None, typer.Option("--name", help="This member's name; default: the machine's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(name: Name, member_name: MemberName = None) -> None:
    """Make a new private swarm, whose first admin this machine is."""
    from bootstrap.membership.folder import SwarmFolder

    folder = SwarmFolder.create(name, own_name(member_name))
    print(f"created swarm={name} role=admin")
    typer.echo(
        f"All of it is in {folder.path}. Keep a copy of its root.key in a safe place: with it a swarm can be saved "
        "that has lost its admins, or taken over. Next: `peer serve MODEL` (or `peer bootstrap`) here, `peer invite`.",
        err=True,
    )


@app.command("list")
def list_(as_json: Json = False) -> None:
    """The private swarms that this machine knows, a line each."""
    from bootstrap.membership.folder import open_swarm, swarm_names

    folders = [open_swarm(name) for name in swarm_names()]
    if as_json:
        print(json.dumps([{"swarm": one.name, "role": one.certificate().role.name.lower()} for one in folders]))
        return
    for one in folders:
        print(f"swarm={one.name} role={one.certificate().role.name.lower()}")


@app.command()
def show(name: Annotated[str | None, typer.Argument(metavar="NAME")] = None, as_json: Json = False) -> None:
    """What this machine knows of a swarm."""
    from bootstrap.membership.roster import Roster
    from protocol.membership.certificate import name_of

    folder = private_swarm(name)
    own, roster = folder.certificate(), Roster(folder.root, folder.read_roster())
    shown = {
        "swarm": folder.name,
        "root": name_of(folder.root),
        "member": own.name,
        "id": own.id,
        "role": own.role.name.lower(),
        "expires": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(own.expires)),
        "members": len(roster.members),
        "folder": str(folder.path),
        "addresses": list(folder.addresses()),
    }
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    for key, value in shown.items():
        print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")


@app.command()
def recover(
    name: Name,
    root_key: Annotated[Path, typer.Argument(parser=as_path, metavar="FILE", help="The swarm's root.key.")],
    member_name: MemberName = None,
) -> None:
    """Make this machine an admin of a swarm that it knows, by the swarm's root key: for when no admin is left."""
    from bootstrap.membership.folder import open_swarm

    folder = open_swarm(name).recover(root_key, own_name(member_name))
    print(f"recovered swarm={folder.name} role=admin")


@app.command()
def forget(name: Name) -> None:
    """Delete all that this machine knows of a swarm, its membership included."""
    from bootstrap.membership.folder import open_swarm

    open_swarm(name).forget()
    print(f"forgot swarm={name}")


def own_name(given: str | None) -> str:
    """A member's name: the one given, or the machine's. Raises `BadUsage` for one that is unprintable or too long."""
    from protocol.membership.certificate import MAX_NAME

    name = given if given is not None else (platform.node().partition(".")[0][:MAX_NAME] or "member")
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise BadUsage(f"{name!r} is no name for a member; expected 1 to {MAX_NAME} printable characters.")
    return name


def private_swarm(name: str | None) -> "SwarmFolder":
    """The swarm that is meant, of those that this machine knows. Raises `BadUsage`."""
    from bootstrap.membership.folder import choose_swarm

    folder = choose_swarm(name, has_addresses=False)
    if folder is None:
        raise BadUsage(
            "This machine has joined no private swarm; `peer join TICKET` or `peer swarm create NAME` first."
        )
    return folder
