"""The command line options by which any member, a peer or a client, finds its swarm."""

from pathlib import Path
from typing import Annotated

import typer

from protocol.errors import BadUsage

InitialPeers = Annotated[
    list[str] | None,
    typer.Option("--initial-peers", metavar="ADDRESS", help="Address of a member of the swarm (may be repeated)."),
]
SwarmKeyFile = Annotated[
    Path | None,
    typer.Option("--swarm-key", metavar="FILE", help="Key file of a private swarm (`peer key create FILE`)."),
]


def need_initial_peers(addresses: list[str] | None) -> tuple[str, ...]:
    """At least one address. Raises `BadUsage`."""
    if not addresses:
        raise BadUsage("Give the address of a member with --initial-peers; `peer serve` and `peer bootstrap` print it.")
    return tuple(addresses)
