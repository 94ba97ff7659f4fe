"""The command line: `peer ...`. Exit codes: 0 done, 1 failed, 2 bad usage."""

import asyncio
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from peer.key import app as key_app
from peer.options import (
    Config,
    InitialPeers,
    LazyGroup,
    SwarmKeyFile,
    need_initial_peers,
    one_of,
    parse_blocks,
    parse_device,
    parse_dtype,
    parse_name,
)
from protocol.errors import (
    BadAdapter,
    BadRequest,
    BadUsage,
    NoSwarm,
    SwarmError,
    TooLong,
    UnsupportedModel,
    WrongKey,
    WrongModel,
)

if TYPE_CHECKING:
    from protocol.model.checkpoint import Checkpoint
    from protocol.records import ModelId

app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fine-tune and run models too big for your GPU, on a swarm of peers.",
)  # fmt: skip
app.add_typer(key_app, name="key")
_USAGE_ERRORS = (BadUsage, BadRequest, BadAdapter, UnsupportedModel, NoSwarm, WrongKey, WrongModel, TooLong)

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")]
Identity = Annotated[Path | None, typer.Option(metavar="FILE", help="Key file of this member; made if missing.")]
Announce = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDRESS", help="Address to announce instead of those found (may be repeated)."),
]


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face folder or hub name.")] = None,
    blocks: Annotated[str | None, typer.Option(metavar="START:END", help="The blocks to serve.")] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="How many blocks; which, the swarm's need says.")
    ] = None,
    initial_peers: InitialPeers = None,
    quantize: Annotated[str, typer.Option(help="none, int8 or nf4.")] = "none",
    double_quantize: Annotated[bool, typer.Option(help="nf4: quantize the scales too (QLoRA).")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    host: Host = "0.0.0.0",
    port: Port = 0,
    announce: Announce = None,
    identity: Identity = None,
    swarm_key: SwarmKeyFile = None,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens that one session may hold.")] = 8192,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that all sessions may hold.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None,
    config: Config = None,
) -> None:
    """Serve a span of a model's blocks: found a swarm, or join one with --initial-peers."""
    import torch

    from bootstrap.member import MemberOptions
    from peer.loading import QUANTIZATIONS
    from peer.server import ServeOptions, Server
    from protocol.model.checkpoint import open_checkpoint

    one_of("--quantize", quantize, QUANTIZATIONS)
    if double_quantize and quantize != "nf4":
        raise BadUsage("--double-quantize goes with --quantize nf4 only.")
    if blocks is not None and num_blocks is not None:
        raise BadUsage("Give --blocks or --num-blocks, not both.")
    parse_blocks(blocks)
    parse_name(name)
    addresses = tuple(initial_peers or ())
    checkpoint = open_checkpoint(model, revision) if model else _open_the_only_model(addresses, swarm_key, revision)
    if threads:
        torch.set_num_threads(threads)
    options = ServeOptions(
        checkpoint=checkpoint,
        blocks=parse_blocks(blocks, checkpoint.model_id.num_blocks),
        num_blocks=num_blocks,
        member=MemberOptions(addresses, host, port, tuple(announce or ()), identity, swarm_key=swarm_key),
        dtype=parse_dtype(dtype),
        device=parse_device(device),
        quantization=quantize,
        double_quantization=double_quantize,
        name=name,
        max_length=max_length,
        cache_tokens=cache_tokens,
    )

    async def run() -> None:
        stop = _stop_on_signals()
        server = await _unless_stopped(Server.start(options), stop)
        if server is not None:
            span = f"blocks={server.span.start}:{server.span.end}"
            _say_ready(server.member.addresses, f"{span} model={checkpoint.model_id.name}")
            await server.run(stop)
        _leave_at_once()

    _run(run())


@app.command()
def bootstrap(
    host: Host = "0.0.0.0",
    port: Port = 0,
    initial_peers: InitialPeers = None,
    announce: Announce = None,
    identity: Identity = None,
    swarm_key: SwarmKeyFile = None,
    config: Config = None,
) -> None:
    """Run a node that only carries the directory of peers: a stable first address for a swarm."""
    from bootstrap.member import Member, MemberOptions
    from protocol.errors import PeerFailed

    options = MemberOptions(
        tuple(initial_peers or ()), host, port, tuple(announce or ()), identity, swarm_key=swarm_key
    )

    async def run() -> None:
        stop = _stop_on_signals()
        member = await _unless_stopped(Member.join(options), stop)
        if member is None:
            return
        _say_ready(member.addresses)
        lost = asyncio.create_task(member.lost.wait())
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({lost, waiting}, return_when=asyncio.FIRST_COMPLETED)
        is_lost = member.lost.is_set()
        await member.shutdown()
        if is_lost:
            raise PeerFailed("The p2pd process died; start this node again.")
        _leave_at_once()

    _run(run())


@app.command()
def status(
    model: Annotated[str | None, typer.Argument(help="Only this model (name as announced, or a folder).")] = None,
    initial_peers: InitialPeers = None,
    swarm_key: SwarmKeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option(help="Show it again every 5 s.")] = False,
    config: Config = None,
) -> None:
    """Show which blocks are served by whom, how fast, how full; and what is missing."""
    from bootstrap.member import Member, MemberOptions
    from peer import status as view

    addresses = need_initial_peers(initial_peers)

    async def run() -> None:
        stop = _stop_on_signals()
        member = await Member.join(MemberOptions(addresses, client_mode=True, swarm_key=swarm_key))
        try:
            models = _only(await member.directory.models(), model)
            if as_json:
                print(json.dumps(view.as_json(models), indent=2))
                return
            console = Console()
            if not watch:
                console.print(view.as_table(models))
                return
            with Live(view.as_table(models), console=console, auto_refresh=False) as live:
                while not stop.is_set():
                    await asyncio.wait({asyncio.create_task(stop.wait())}, timeout=5)
                    live.update(view.as_table(_only(await member.directory.models(), model)), refresh=True)
        finally:
            await member.shutdown()

    _run(run())


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Another model: a folder or hub name.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the fine-tuning.")] = 40,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter goes.")] = Path("demo-adapter"),
) -> None:
    """The whole thing on this machine in one go: a swarm, text from it, an adapter trained through it."""
    from peer.demo import run_demo

    run_demo(model, steps, output)


def main() -> None:
    """The entry point."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for room in ("peer", "bootstrap", "client"):
        logging.getLogger(room).setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves; users can do nothing about them
    try:
        app()
    except SwarmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, _USAGE_ERRORS) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    run(coroutine)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _unless_stopped(starting: Coroutine[Any, Any, Any], stop: asyncio.Event) -> Any:
    """The result of `starting`, or `None` when the user wants to stop before it is there."""
    task, stopped = asyncio.create_task(starting), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    return task.result()


def _leave_at_once() -> NoReturn:
    """Everything is closed; the interpreter's own end takes a second, and waits for a thread that loads or computes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _say_ready(addresses: list[str], details: str = "") -> None:
    print(f"ready address={addresses[0]} {details}".rstrip(), flush=True)
    for other in addresses[1:]:
        logging.getLogger("peer").info("also at %s", other)


def _open_the_only_model(addresses: tuple[str, ...], swarm_key: Path | None, revision: str | None) -> "Checkpoint":
    """The swarm's model, when it has exactly one and that is found here or on the hub. Raises `BadUsage`."""
    from protocol.model.checkpoint import open_checkpoint

    found = asyncio.run(_look_for_models(addresses, swarm_key))
    names = ", ".join(model.name for model in found)
    if len(found) != 1:
        raise BadUsage(f"The swarm serves {len(found)} models ({names or 'none'}); name the MODEL to serve.")
    try:
        checkpoint = open_checkpoint(names, revision)
    except UnsupportedModel as error:
        raise BadUsage(
            f"The swarm's model is called {names!r}, which is no folder here and not found on the hub; "
            "name its folder as MODEL."
        ) from error
    if checkpoint.model_id.config_hash != found[0].config_hash:
        raise BadUsage(f"What is called {names!r} here is another model than the swarm's; name its folder as MODEL.")
    return checkpoint


async def _look_for_models(addresses: tuple[str, ...], swarm_key: Path | None) -> list["ModelId"]:
    from bootstrap.member import Member, MemberOptions

    if not addresses:
        raise BadUsage("Name a MODEL to found a swarm, or join one with --initial-peers.")
    member = await Member.join(MemberOptions(addresses, client_mode=True, swarm_key=swarm_key))
    try:
        return list(await member.directory.models())
    finally:
        await member.shutdown()


def _only(models: dict[Any, Any], wanted: str | None) -> dict[Any, Any]:
    if wanted is None:
        return models
    name = Path(wanted).resolve().name if Path(wanted).is_dir() else wanted
    chosen = {model: peers for model, peers in models.items() if model.name == name}
    if not chosen:
        known = ", ".join(model.name for model in models) or "none"
        raise BadUsage(f"No peer serves {wanted!r} in this swarm; its models: {known}.")
    return chosen


if __name__ == "__main__":
    main()
