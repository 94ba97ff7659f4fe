"""`peer share`, which gives a model's files and serves nothing, and `peer cache`: the models that were fetched."""

import asyncio
import time
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from bootstrap.options import Announce, DirectPort, Discovery, Host, Identity, InitialPeers, Port, SwarmName, as_model
from bootstrap.ports import ANY
from peer.commands.options import Config, with_fields
from peer.commands.process import leave_at_once, run, say_ready, stop_on_signals, unless_stopped
from peer.weights.options import WeightsOptions
from protocol.errors import BadUsage, PeerFailed
from protocol.machine.inspection import describe_on_signal
from protocol.machine.terminal import new_console

app = typer.Typer(no_args_is_help=True, help="The models that were fetched from other members: list them, remove them.")


@with_fields
def share(
    model: Annotated[
        str, typer.Argument(parser=as_model, help="A Hugging Face folder, a model that the swarm has, or a hub name.")
    ],
    initial_peers: InitialPeers = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    host: Host = ANY,
    port: Port = 0,
    direct_port: DirectPort = 0,
    announce: Announce = None,
    identity: Identity = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    *,
    options: WeightsOptions,
    config: Config = None,
) -> None:
    """Give a model's files to the members of a swarm, and serve no blocks: for a machine with the disk and no GPU."""
    from bootstrap.member import Member, MemberOptions
    from bootstrap.membership.folder import choose_swarm
    from peer.sharer import Sharer
    from protocol.membership.certificate import Role
    from protocol.model.checkpoint import is_here, may_be_on_hub, open_checkpoint
    from protocol.tensors import Limits

    membership = MemberOptions(
        tuple(initial_peers or ()), host, port, tuple(announce or ()), identity, direct_port,
        swarm=choose_swarm(swarm, bool(initial_peers), discovery), role=Role.SERVE,
    )  # fmt: skip

    async def start() -> Sharer:
        here = revision is not None or is_here(model) or not may_be_on_hub(model)
        checkpoint = await asyncio.to_thread(open_checkpoint, model, revision) if here else None
        sharer = Sharer(await Member.join(membership), name, options, Limits())
        await sharer.start()
        if checkpoint is None:
            checkpoint = await sharer.obtain(model)
        if checkpoint is None:
            checkpoint = await asyncio.to_thread(open_checkpoint, model, revision)
        shared = await sharer.hold(options.named(checkpoint))
        say_ready(sharer.member.addresses, f"model={shared.model.name} manifest={shared.held.manifest.hash}")
        return sharer

    async def work() -> None:
        stop = stop_on_signals()
        sharer = await unless_stopped(start(), stop)
        if sharer is None:
            return
        describe_on_signal(sharer.describe)
        waiting = [asyncio.create_task(event.wait()) for event in (stop, sharer.member.lost)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        is_lost = sharer.member.lost.is_set()
        await sharer.leave()
        if is_lost:
            raise PeerFailed("The p2pd process died; start this command again.")
        leave_at_once()

    run(work())


@app.command("list")
def list_models() -> None:
    """Show the models that were fetched, and how much of each is here."""
    from protocol.weights.cache import Cache

    cache = Cache()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("model", "version", "MB here", "MB of all", "used"):
        table.add_column(column, overflow="fold")
    for entry in cache.entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        cells = (entry.model.name, entry.manifest[:12], f"{entry.held / 1e6:,.1f}", f"{entry.size / 1e6:,.1f}", used)
        table.add_row(*map(Text, cells))
    new_console().print(table if table.row_count else f"No model has been fetched into {cache.root}.")


@app.command()
def remove(
    model: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="As `peer cache list` shows it.")],
) -> None:
    """Delete fetched models of this name, and forget which version of it this machine uses."""
    from bootstrap.membership.folder import open_swarm, swarm_names
    from protocol.weights.cache import Cache
    from protocol.weights.obtain import Pins

    cache = Cache()
    name, _, version = model.partition("@")
    entries = [one for one in cache.entries() if one.model.name == name and one.manifest.startswith(version)]
    if not entries:
        known = ", ".join(sorted({entry.model.name for entry in cache.entries()})) or "none"
        raise BadUsage(f"No model {model!r} has been fetched; those that have: {known}.")
    folders = [cache.root, *(open_swarm(swarm).models for swarm in swarm_names())]
    for entry in entries:
        if not cache.remove(entry):
            raise BadUsage(f"{name}@{entry.manifest[:12]} is in use by a process on this machine; stop that first.")
        for pins in map(Pins, folders):
            if pins.get(name) == entry.manifest:
                pins.set(name, None)
        print(f"removed model={name} version={entry.manifest[:12]} bytes={entry.held}")
