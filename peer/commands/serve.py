"""`peer serve`: what it is told, checked and handed to the server."""

import asyncio
import gc
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from peer.commands.options import (
    Announce,
    Config,
    Host,
    Identity,
    InitialPeers,
    Port,
    SwarmKeyFile,
    one_of,
    parse_blocks,
    parse_device,
    parse_dtype,
    parse_name,
)
from peer.commands.process import (
    leave_at_once,
    run,
    say_ready,
    stop_on_signals,
    unless_stopped,
)
from peer.service.quotas import Quota
from protocol.errors import BadUsage, UnsupportedModel
from protocol.machine.imports import without_collection

if TYPE_CHECKING:
    from bootstrap.member import Member, MemberOptions
    from peer.server import Server
    from peer.start.assembly import ServeOptions
    from protocol.model.checkpoint import Checkpoint

_QUANTIZATIONS = ("none", "int8", "nf4")

# The server and all that it imports (torch, Transformers) are loaded when a peer is started, not for `peer --help`.


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
    direct_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on for direct connections; 0: any free one.")
    ] = 0,
    announce: Announce = None,
    announce_direct: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Address for direct connections to announce (may be repeated)."),
    ] = None,
    identity: Identity = None,
    swarm_key: SwarmKeyFile = None,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens that one session may hold.")] = 8192,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that all sessions may hold.")] = None,
    idle_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds after which a generation may have to give its memory to others.")
    ] = 30.0,
    max_message: Annotated[
        int | None, typer.Option(min=2**20, help="Bytes of tensors in one message; default: 512 MiB.")
    ] = None,
    client_streams: Annotated[int, typer.Option(min=1, help="Connections of one client.")] = Quota.streams,
    client_sessions: Annotated[int, typer.Option(min=1, help="Generations of one client at a time.")] = Quota.sessions,
    client_cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that one client's generations may hold; default: all.")
    ] = None,
    client_calls: Annotated[int, typer.Option(min=1, help="Requests of one client at a time.")] = Quota.calls,
    client_adapters: Annotated[int, typer.Option(min=1, help="Adapters kept for one client.")] = Quota.adapters,
    client_adapter_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of adapters kept for one client; default: all.")
    ] = None,
    client_rate: Annotated[
        float | None, typer.Option(min=1, help="Bytes per second that one client may send; default: any.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that clients get to go elsewhere when this peer is told to stop.")
    ] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, max=4096, help="CPU threads to compute with.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile decode steps (torch.compile): starts later, steps sooner.")
    ] = False,
    config: Config = None,
) -> None:
    """Serve a span of a model's blocks: found a swarm, or join one with --initial-peers."""
    one_of("--quantize", quantize, _QUANTIZATIONS)
    if double_quantize and quantize != "nf4":
        raise BadUsage("--double-quantize goes with --quantize nf4 only.")
    if blocks is not None and num_blocks is not None:
        raise BadUsage("Give --blocks or --num-blocks, not both.")
    parse_blocks(blocks)
    parse_name(name)
    addresses = tuple(initial_peers or ())
    if model is None and not addresses:
        raise BadUsage("Name a MODEL to found a swarm, or join one with --initial-peers.")
    with without_collection():
        import torch

        from bootstrap.member import MemberOptions
    chosen_dtype, chosen_device = parse_dtype(dtype), parse_device(device)
    if threads:
        torch.set_num_threads(threads)
    quota = Quota(
        streams=client_streams,
        sessions=client_sessions,
        cache_tokens=client_cache_tokens,
        calls=client_calls,
        adapters=client_adapters,
        adapter_bytes=client_adapter_bytes,
        bytes_per_second=client_rate or inf,
    )

    def complete(checkpoint: "Checkpoint") -> "ServeOptions":
        from peer.start.assembly import ServeOptions
        from protocol.tensors import Limits

        return ServeOptions(
            checkpoint=checkpoint,
            blocks=parse_blocks(blocks, checkpoint.model_id.num_blocks),
            num_blocks=num_blocks,
            dtype=chosen_dtype,
            device=chosen_device,
            quantization=quantize,
            double_quantization=double_quantize,
            name=name,
            max_length=max_length,
            cache_tokens=cache_tokens,
            idle_timeout=idle_timeout,
            quota=quota,
            max_message=max_message or Limits.max_payload,
            drain_timeout=drain_timeout,
            compile=compile_,
        )

    membership = MemberOptions(
        addresses, host, port, tuple(announce or ()), identity, direct_port, tuple(announce_direct or ()),
        swarm_key=swarm_key,
    )  # fmt: skip
    run(_serve(membership, model, revision, complete))


_Complete = Callable[["Checkpoint"], "ServeOptions"]
"""What is left to be known of the options follows from the checkpoint."""


async def _serve(membership: "MemberOptions", model: str | None, revision: str | None, complete: _Complete) -> None:
    stop = stop_on_signals()
    server = await unless_stopped(_start(membership, model, revision, complete), stop)
    if server is not None:
        span = f"blocks={server.span.start}:{server.span.end}"
        say_ready(server.member.addresses, f"{span} model={server.options.checkpoint.model_id.name}")
        await server.run(stop)
    leave_at_once()


async def _start(membership: "MemberOptions", model: str | None, revision: str | None, complete: _Complete) -> "Server":
    """Join while Transformers is being imported: what a join takes is another process's time, p2pd's."""
    from bootstrap.member import Member

    joining = asyncio.create_task(Member.join(membership))
    try:
        if model is None:
            checkpoint = await _open_the_only_model(await joining, revision)
        else:
            checkpoint = await asyncio.to_thread(_open, model, revision)
        await asyncio.to_thread(_import_server)
        from peer.server import Server

        return await Server.start(complete(checkpoint), joining)
    except BaseException:
        joining.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await (await joining).shutdown()
        raise


def _open(model: str, revision: str | None) -> "Checkpoint":
    with without_collection():
        from protocol.model.checkpoint import open_checkpoint

    return open_checkpoint(model, revision)


def _import_server() -> None:
    with without_collection():
        import peer.server  # noqa: F401
    gc.freeze()  # nothing of this will ever be garbage, and to look through it takes 0.2 s each time


async def _open_the_only_model(member: "Member", revision: str | None) -> "Checkpoint":
    """The swarm's model, when it has exactly one and that is found here or on the hub. Raises `BadUsage`."""
    found = list(await member.directory.models())
    names = ", ".join(model.name for model in found)
    if len(found) != 1:
        raise BadUsage(f"The swarm serves {len(found)} models ({names or 'none'}); name the MODEL to serve.")
    try:
        checkpoint = await asyncio.to_thread(_open, names, revision)
    except UnsupportedModel as error:
        raise BadUsage(
            f"The swarm's model is called {names!r}, which is no folder here and not found on the hub; "
            "name its folder as MODEL."
        ) from error
    if checkpoint.model_id.config_hash != found[0].config_hash:
        raise BadUsage(f"What is called {names!r} here is another model than the swarm's; name its folder as MODEL.")
    return checkpoint
