"""The command line options that members of a swarm share: how to find it, where to listen, who one is. And how any
command reads a path."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import BadUsage
from protocol.machine.paths import expand, local_path

if TYPE_CHECKING:
    from bootstrap.membership.folder import SwarmFolder


def as_path(text: str | Path) -> Path:
    """A path that a person gave: the `parser` of every option that is one. Raises `BadUsage`."""
    try:
        return local_path(str(text))
    except ValueError as error:
        raise BadUsage(f"{error}.") from error


def as_model(text: str) -> str:
    """A folder or hub name that a person gave: the `parser` of every option that is one. Raises `BadUsage`."""
    try:
        return expand(text)
    except ValueError as error:
        raise BadUsage(f"{error}.") from error


InitialPeers = Annotated[
    list[str] | None,
    typer.Option("--initial-peers", metavar="ADDRESS", help="Address of a member of the swarm (may be repeated)."),
]
SwarmName = Annotated[
    str | None,
    typer.Option(
        "--swarm",
        metavar="NAME",
        help="A private swarm that this machine has joined; default: the only one. `open`: none of them.",
    ),
]
Discovery = Annotated[
    bool,
    typer.Option(
        "--discovery/--no-discovery",
        help="In a private swarm, find members on this network and be found, by DNS-SD (mDNS).",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; any: all of this machine's, IPv4 and IPv6.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")]
DirectPort = Annotated[
    int, typer.Option(min=0, max=65535, help="Port to listen on for direct connections; 0: any free one.")
]
Identity = Annotated[
    Path | None, typer.Option(parser=as_path, metavar="FILE", help="Key file of this member; made if missing.")
]
Announce = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDRESS", help="Address to announce instead of those found (may be repeated)."),
]


def find_swarm(
    name: str | None, addresses: Sequence[str] | None, discovery: bool = True
) -> "tuple[tuple[str, ...], SwarmFolder | None]":
    """The members that were named, and the private swarm that is meant, for a command that needs one or the other.

    `discovery`: see `SwarmFolder`. Raises `BadUsage`.
    """
    from bootstrap.membership.folder import choose_swarm

    given = tuple(addresses or ())
    folder = choose_swarm(name, bool(given), discovery)
    if not given and folder is None:
        raise BadUsage(
            "Give the address of a member with --initial-peers (in Python: initial_peers=), which `peer serve` and "
            "`peer bootstrap` print, or join a private swarm with `peer join TICKET`."
        )
    return given, folder
