"""The command line: `peer ...`. Exit codes: 0 done, 1 failed, 2 bad usage."""

import asyncio
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from bootstrap.options import (
    Announce,
    DirectPort,
    Discovery,
    Host,
    Identity,
    InitialPeers,
    Port,
    SwarmName,
    as_model,
    as_path,
    find_swarm,
)
from bootstrap.ports import ANY
from peer.commands.invite import invite, offer_invitation
from peer.commands.members import join, members, revoke
from peer.commands.options import Config, LazyGroup
from peer.commands.process import leave_at_once, run, say_ready, stop_on_signals, unless_stopped
from peer.commands.serve import serve
from peer.commands.swarm import app as swarm_app
from peer.commands.weights import app as cache_app
from peer.commands.weights import share
from protocol.errors import (
    BadAdapter,
    BadRequest,
    BadUsage,
    NoSwarm,
    NotAllowed,
    NotAMember,
    SwarmError,
    TooLong,
    UnsupportedModel,
    WrongModel,
)
from protocol.machine.inspection import describe_on_signal, show_stacks_on_signal
from protocol.machine.paths import model_name
from protocol.machine.terminal import escape_what_cannot_be_written, new_console

if TYPE_CHECKING:
    from peer.commands import status as view

app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune and run models too big for your GPU, on a swarm of peers.",
)  # fmt: skip
app.add_typer(swarm_app, name="swarm")
app.add_typer(cache_app, name="cache")
_USAGE_ERRORS = (
    BadUsage,
    BadRequest,
    BadAdapter,
    UnsupportedModel,
    NoSwarm,
    NotAMember,
    NotAllowed,
    WrongModel,
    TooLong,
)

for command in (serve, share, invite, join, members, revoke):
    app.command()(command)


@app.command()
def bootstrap(
    host: Host = ANY,
    port: Port = 0,
    initial_peers: InitialPeers = None,
    announce: Announce = None,
    identity: Identity = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    config: Config = None,
) -> None:
    """Run a node that only carries the directory of peers: a stable first address for a swarm."""
    from bootstrap.member import Member, MemberOptions
    from bootstrap.membership.folder import choose_swarm
    from protocol.errors import PeerFailed

    folder = choose_swarm(swarm, bool(initial_peers), discovery)
    options = MemberOptions(tuple(initial_peers or ()), host, port, tuple(announce or ()), identity, swarm=folder)

    async def work() -> None:
        stop = stop_on_signals()
        member = await unless_stopped(Member.join(options), stop)
        if member is None:
            return
        say_ready(member.addresses)
        if member.membership is not None:
            offer_invitation(member.membership)
        describe_on_signal(member.describe)
        lost = asyncio.create_task(member.lost.wait())
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({lost, waiting}, return_when=asyncio.FIRST_COMPLETED)
        is_lost = member.lost.is_set()
        await member.shutdown()
        if is_lost:
            raise PeerFailed("The p2pd process died; start this node again.")
        leave_at_once()

    run(work())


@app.command()
def status(
    model: Annotated[
        str | None, typer.Argument(parser=as_model, help="Only this model (name as announced, or a folder).")
    ] = None,
    initial_peers: InitialPeers = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option(help="Show it again every 5 s.")] = False,
    config: Config = None,
) -> None:
    """Show which blocks are served by whom, how fast, how full; and what is missing."""
    from bootstrap.member import Member, MemberOptions
    from peer.commands import status as view

    addresses, folder = find_swarm(swarm, initial_peers, discovery)

    async def work() -> None:
        stop = stop_on_signals()
        member = await Member.join(MemberOptions(addresses, client_mode=True, swarm=folder))

        async def look() -> tuple[view.Models, view.Complaints, view.Weights]:
            found, weights = await member.directory.models(), await member.directory.weights()
            models, weights = _only(found, weights, model)
            return models, await view.read_complaints(member.directory, models), weights

        try:
            state = await look()
            if as_json:
                print(json.dumps(view.as_json(*state), indent=2))
                return
            console = new_console()
            if not watch:
                console.print(view.as_table(*state))
                return
            with Live(view.as_table(*state), console=console, auto_refresh=False) as live:
                while not stop.is_set():
                    await asyncio.wait({asyncio.create_task(stop.wait())}, timeout=5)
                    live.update(view.as_table(*await look()), refresh=True)
        finally:
            await member.shutdown()

    run(work())


@app.command()
def doctor(
    ticket: Annotated[
        str | None, typer.Argument(metavar="TICKET", help="Of a swarm that this machine could not join.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(parser=as_model, metavar="MODEL", help="A folder or hub name, to be served or used."),
    ] = None,
    blocks: Annotated[str | None, typer.Option(metavar="START:END", help="The blocks that are to be served.")] = None,
    device: Annotated[str, typer.Option(help="As of `peer serve`.")] = "auto",
    initial_peers: InitialPeers = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    host: Host = ANY,
    port: Port = 0,
    direct_port: DirectPort = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Config = None,
) -> None:
    """Find out why this machine cannot join, serve or use a swarm, and what to do. Exit code 1: something is wrong."""
    from bootstrap.member import MemberOptions
    from bootstrap.membership.folder import OPEN, choose_swarm
    from peer.doctor import report
    from peer.doctor.case import Case
    from peer.doctor.examination import examine
    from peer.start.options import ServeOptions

    if ticket is not None:
        from bootstrap.membership.ticket import Ticket

        initial_peers, swarm = list(Ticket.from_text(ticket.removeprefix("ticket=")).addresses), OPEN
    serving = ServeOptions(blocks=blocks, device=device)
    serving.check()
    folder = choose_swarm(swarm, bool(initial_peers), discovery)
    membership = MemberOptions(tuple(initial_peers or ()), host, port, direct_port=direct_port, swarm=folder)

    async def work() -> None:
        case, console, found = Case(membership, serving, model), new_console(), []
        logging.disable(logging.ERROR)  # what is logged meanwhile is found, too, and said better
        try:
            async for check, findings in examine(case):
                found += [(check, finding) for finding in findings]
                if not as_json:
                    for line in report.lines(check, findings, console.is_terminal):
                        console.print(line)
        finally:
            await case.close()
            logging.disable(logging.NOTSET)
        shown = report.as_json(found)
        if as_json:
            print(json.dumps(shown, indent=2))
        else:
            console.print(report.summary(finding for _, finding in found))
        if not shown["well"]:
            raise typer.Exit(1)

    run(work())


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(parser=as_model, metavar="MODEL", help="Another model: a folder or hub name.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the fine-tuning.")] = 40,
    output: Annotated[Path, typer.Option(parser=as_path, metavar="DIR", help="Where the adapter goes.")] = Path(
        "demo-adapter"
    ),
) -> None:
    """The whole thing on this machine in one go: a swarm, text from it, an adapter trained through it."""
    from peer.commands.demo import run_demo

    run_demo(model, steps, output)


def main() -> None:
    """The entry point."""
    escape_what_cannot_be_written()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for room in ("peer", "bootstrap", "client"):
        logging.getLogger(room).setLevel(logging.INFO)
    show_stacks_on_signal()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves; users can do nothing about them
    try:
        app()
    except SwarmError as error:
        print("error:", *filter(None, (str(error), error.advice)), file=sys.stderr)
        sys.exit(2 if isinstance(error, _USAGE_ERRORS) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _only(models: "view.Models", weights: "view.Weights", wanted: str | None) -> "tuple[view.Models, view.Weights]":
    """What there is of one model; `wanted` None: of all."""
    if wanted is None:
        return models, weights
    name = model_name(wanted)
    chosen = {model: peers for model, peers in models.items() if model.name == name}
    parts = [[one for one in record.models if one.model.name == name] for record in weights]
    given = [record.model_copy(update={"models": part}) for record, part in zip(weights, parts, strict=True) if part]
    if not chosen and not given:
        known = ", ".join(model.name for model in models) or "none"
        raise BadUsage(f"No peer serves {wanted!r} in this swarm; its models: {known}.")
    return chosen, given
