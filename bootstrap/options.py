"""The command line options that members of a swarm share: how to find it, where to listen, who one is. And how any
command reads a path."""

from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import BadUsage
from protocol.machine.paths import expand, local_path


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
SwarmKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--swarm-key", parser=as_path, metavar="FILE", help="Key file of a private swarm (`peer key create FILE`)."
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")]
Identity = Annotated[
    Path | None, typer.Option(parser=as_path, metavar="FILE", help="Key file of this member; made if missing.")
]
Announce = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDRESS", help="Address to announce instead of those found (may be repeated)."),
]


def need_initial_peers(addresses: list[str] | None) -> tuple[str, ...]:
    """At least one address. Raises `BadUsage`."""
    if not addresses:
        raise BadUsage("Give the address of a member with --initial-peers; `peer serve` and `peer bootstrap` print it.")
    return tuple(addresses)
