"""`peer serve`: what it is told, checked and handed to the server."""

import asyncio
import gc
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from bootstrap.options import Announce, DirectPort, Discovery, Host, Identity, InitialPeers, Port, SwarmName, as_model
from bootstrap.ports import ANY
from peer.commands.invite import offer_invitation
from peer.commands.options import Config, with_fields
from peer.commands.process import leave_at_once, run, say_ready, stop_on_signals, unless_stopped
from peer.commands.supervisor import Supervisor
from peer.start.last_served import LastServed
from peer.start.options import ServeOptions
from protocol.errors import BadUsage, UnsupportedModel
from protocol.machine.imports import without_collection
from protocol.machine.inspection import describe_on_signal

if TYPE_CHECKING:
    from bootstrap.member import Member, MemberOptions
    from bootstrap.membership.folder import SwarmFolder
    from peer.server import Server
    from peer.sharer import Sharer
    from protocol.model.checkpoint import Checkpoint
    from protocol.records import ModelId

_IMPORTING = threading.Lock()
"""Two threads must not import Transformers at a time: what it loads lazily would be seen half made."""

_PORTS_APART = 10
"""Of the next peer from those of the one before it: a peer may have two ports side by side."""

# The server and all that it imports (torch, Transformers) are loaded when a peer is started, not for `peer --help`.


@with_fields
def serve(
    model: Annotated[
        str | None,
        typer.Argument(parser=as_model, help="A Hugging Face folder, a model that the swarm has, or a hub name."),
    ] = None,
    initial_peers: InitialPeers = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    host: Host = ANY,
    port: Port = 0,
    direct_port: DirectPort = 0,
    announce: Announce = None,
    announce_direct: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Address for direct connections to announce (may be repeated)."),
    ] = None,
    identity: Identity = None,
    swarm: SwarmName = None,
    restart: Annotated[
        bool, typer.Option(help="Start a peer again that fails: its device is lost, p2pd has died, it was killed.")
    ] = False,
    discovery: Discovery = True,
    *,
    options: ServeOptions,
    config: Config = None,
) -> None:
    """Serve a span of a model's blocks: found a swarm, or join one with --swarm or --initial-peers.

    With several devices (--device cuda:0,cuda:1) each has a peer, one after the other, as by a command for each.

    --num-blocks is each one's; --blocks has a span for each (0:12,12:24). The second has ports 10 further, and FILE.1.

    Should one fail the others serve on, as clients need them the more; the exit code will be 1.
    """
    from bootstrap.membership.folder import choose_swarm

    each = options.for_each_device()
    for one in each:
        one.check()
    folder = choose_swarm(swarm, bool(initial_peers), discovery)
    if model is None and not initial_peers and folder is None:
        raise BadUsage("Name a MODEL to found a swarm, or join one with --swarm or --initial-peers.")
    if restart or len(each) > 1:
        if len(each) > 1 and (announce or announce_direct):
            raise BadUsage("--announce and --announce-direct are of one peer; give a command for each device.")
        _serve_each(each, port, direct_port, identity, folder, founds=not initial_peers, restarts=restart)
    with without_collection():
        import torch

        from bootstrap.member import MemberOptions
        from protocol.membership.certificate import Role
    options.check_machine()
    if options.threads:
        torch.set_num_threads(options.threads)
    membership = MemberOptions(
        tuple(initial_peers or ()),
        host,
        port,
        tuple(announce or ()),
        identity,
        direct_port,
        tuple(announce_direct or ()),
        swarm=folder,
        role=Role.SERVE,
    )
    run(_serve(options, membership, model, revision))


def _serve_each(
    each: Sequence[ServeOptions], port: int, direct_port: int, identity: Path | None, folder: "SwarmFolder | None", *,
    founds: bool, restarts: bool,
) -> None:  # fmt: skip
    """A peer for each of the options, as a process of its own. Raises `typer.Exit` when they have ended."""
    from bootstrap.membership.folder import OPEN

    with TemporaryDirectory() as temporary:  # a peer that is started again is the same one to others
        named, name = identity or Path(temporary, "identity"), folder.name if folder else OPEN
        first = identity if folder else named  # a private swarm's folder has one
        kept = [first, *(Path(f"{named}.{index}") for index in range(1, len(each)))]
        own = [_Own(one, index, port, direct_port, kept[index], name) for index, one in enumerate(each)]
        run(_supervise(own, founds, restarts))


@dataclass(frozen=True)
class _Own:
    """What one of a command's peers has of its own, in place of what was typed."""

    options: ServeOptions
    index: int
    port: int
    direct_port: int
    identity: Path | None
    swarm: str

    def argv(self, initial_peers: Iterable[str]) -> list[str]:
        """The command line: the same again, with these options last, which are those that count."""
        options, further = self.options, self.index * _PORTS_APART
        own = ["--no-restart", "--device", options.device]
        own += ["--blocks", options.blocks] if options.blocks else []
        own += ["--memory", options.memory] if options.memory else []
        own += ["--port", str(self.port + further)] if self.port else []
        own += ["--direct-port", str(self.direct_port + further)] if self.direct_port else []
        own += ["--identity", str(self.identity)] if self.identity else []
        own += ["--swarm", self.swarm]
        own += [part for address in initial_peers for part in ("--initial-peers", address)]
        typed = sys.argv[1:]
        end = typed.index("--") if "--" in typed else len(typed)
        return [sys.executable, "-m", "peer", *typed[:end], *own, *typed[end:]]


async def _supervise(own: Sequence[_Own], founds: bool, restarts: bool) -> None:
    """Run the peers as processes. Raises `typer.Exit` when they have ended."""
    supervisor = Supervisor(restarts)
    devices = [one.options.device for one in own]
    labels = [name if devices.count(name) == 1 else f"{name}/{index}" for index, name in enumerate(devices)]
    # The first founds the swarm that the next ones join, and that it joins itself when it is started again.
    code = await supervisor.run(labels, lambda index: own[index].argv(supervisor.addresses if founds else ()))
    raise typer.Exit(code)


async def _serve(options: ServeOptions, membership: "MemberOptions", model: str | None, revision: str | None) -> None:
    stop = stop_on_signals()
    server = await unless_stopped(_start(options, membership, model, revision), stop)
    if server is not None:
        span = f"blocks={server.span.start}:{server.span.end}"
        say_ready(server.member.addresses, f"{span} model={server.model_id.name}")
        if server.member.membership is not None:
            offer_invitation(server.member.membership)
        describe_on_signal(server.describe)
        await server.run(stop)
    leave_at_once()


async def _start(
    options: ServeOptions, membership: "MemberOptions", model: str | None, revision: str | None
) -> "Server":
    """Join while Transformers is being imported: what a join takes is another process's time, p2pd's."""
    from bootstrap.member import Member

    joining = asyncio.create_task(_share(options, asyncio.create_task(Member.join(membership))))
    try:
        if model is None and revision is None and membership.swarm is not None:
            options, checkpoint = await _go_on(options, membership.swarm, joining)
        else:
            checkpoint = await _open_model(model, revision, joining)
        await asyncio.to_thread(_import_server)
        from peer.server import Server

        server = await Server.start(options, options.weights.named(checkpoint), joining)
        if membership.swarm is not None:
            LastServed(
                place=str(Path(checkpoint.name).absolute()) if Path(checkpoint.name).is_dir() else checkpoint.name,
                revision=checkpoint.revision,
                called=options.weights.named(checkpoint).called,
                config_hash=server.model_id.config_hash,
                blocks=f"{server.span.start}:{server.span.end}",
            ).write(membership.swarm)
        return server
    except BaseException:
        joining.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await (await joining).leave()
        raise


async def _share(options: ServeOptions, joining: "asyncio.Task[Member]") -> "Sharer":
    try:
        await asyncio.to_thread(_import_sharer)
        from peer.sharer import Sharer
        from protocol.tensors import Limits

        member = await joining
    except BaseException:
        joining.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await (await joining).shutdown()
        raise
    limits = Limits(max_payload=options.max_message or Limits.max_payload)
    sharer = Sharer(member, options.name, options.weights, limits)
    await sharer.start()
    return sharer


async def _go_on(
    options: ServeOptions, swarm: "SwarmFolder", joining: "asyncio.Task[Sharer]"
) -> "tuple[ServeOptions, Checkpoint]":
    """What to serve where no model is named: what this machine served last, unless the swarm has other models only.

    Where nobody serves it now, these are the same blocks as then: more may not be at hand. Raises `BadUsage` as
    `_find_the_only_model`.
    """
    from protocol.model.checkpoint import open_checkpoint

    sharer = await joining
    last, found = LastServed.read(swarm), await _find_models(sharer)
    if last is None or (found and last.config_hash not in found):
        return options, await _open_model(None, None, joining)
    try:
        checkpoint = await sharer.reopen(Path(last.place))
        if checkpoint is None:
            checkpoint = await asyncio.to_thread(open_checkpoint, last.place, last.revision)
    except UnsupportedModel:  # it has gone from here
        return options, await _open_model(None, None, joining)
    if not found and not options.num_blocks:
        options = replace(options, blocks=options.blocks or last.blocks)
    return options, replace(checkpoint, called=last.called)


async def _open_model(model: str | None, revision: str | None, joining: "asyncio.Task[Sharer]") -> "Checkpoint":
    """The model of this name: that of this machine, else the swarm's, else the hub's. `None`: the swarm's only one."""
    expected = await _find_the_only_model(await joining) if model is None else None
    name = model or (expected.name if expected else "")
    given = None
    if revision is None and not await asyncio.to_thread(_is_here, name):
        given = await (await joining).obtain(name)
    checkpoint = given if given is not None else await asyncio.to_thread(_open, name, revision)
    if expected is not None and checkpoint.model_id.config_hash != expected.config_hash:
        raise BadUsage(f"What is called {name!r} here is another model than the swarm's; name its folder as MODEL.")
    return checkpoint


def _import_sharer() -> None:
    with _IMPORTING, without_collection():
        import peer.sharer  # noqa: F401


def _is_here(model: str) -> bool:
    _import_sharer()
    from protocol.model.checkpoint import is_here, may_be_on_hub

    return is_here(model) or not may_be_on_hub(model)


def _open(model: str, revision: str | None) -> "Checkpoint":
    from protocol.model.checkpoint import open_checkpoint

    return open_checkpoint(model, revision)


def _import_server() -> None:
    with without_collection():
        import peer.server  # noqa: F401
    gc.freeze()  # nothing of this will ever be garbage, and to look through it takes 0.2 s each time


async def _find_models(sharer: "Sharer") -> "dict[str, ModelId]":
    """Hash of the configuration -> each model that the swarm serves, or gives the files of."""
    served = list(await sharer.member.directory.models())
    given = [offer.model for offer in await sharer.library.offers()]
    return {model.config_hash: model for model in (*given, *served)}


async def _find_the_only_model(sharer: "Sharer") -> "ModelId":
    """The swarm's model, when it has exactly one. Raises `BadUsage`."""
    found = await _find_models(sharer)
    names = ", ".join(model.name for model in found.values())
    if len(found) != 1:
        raise BadUsage(f"The swarm serves {len(found)} models ({names or 'none'}); name the MODEL to serve.")
    return next(iter(found.values()))
