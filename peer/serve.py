"""`peer serve`: what it is told, checked and handed to the server."""

import asyncio
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peer.options import (
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
from peer.process import leave_at_once, run, say_ready, stop_on_signals, unless_stopped
from peer.quotas import Quota
from protocol.errors import BadUsage, UnsupportedModel
from protocol.tensors import Limits

if TYPE_CHECKING:
    from peer.server import ServeOptions
    from protocol.model.checkpoint import Checkpoint
    from protocol.records import ModelId

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
    max_message: Annotated[int, typer.Option(min=2**20, help="Bytes of tensors in one message.")] = Limits.max_payload,
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile decode steps (torch.compile): starts later, steps sooner.")
    ] = False,
    config: Config = None,
) -> None:
    """Serve a span of a model's blocks: found a swarm, or join one with --initial-peers."""
    import torch

    from bootstrap.member import MemberOptions
    from peer.loading import QUANTIZATIONS
    from peer.server import ServeOptions
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
    quota = Quota(
        streams=client_streams,
        sessions=client_sessions,
        cache_tokens=client_cache_tokens,
        calls=client_calls,
        adapters=client_adapters,
        adapter_bytes=client_adapter_bytes,
        bytes_per_second=client_rate or inf,
    )
    options = ServeOptions(
        checkpoint=checkpoint,
        blocks=parse_blocks(blocks, checkpoint.model_id.num_blocks),
        num_blocks=num_blocks,
        member=MemberOptions(
            addresses,
            host,
            port,
            tuple(announce or ()),
            identity,
            direct_port,
            tuple(announce_direct or ()),
            swarm_key=swarm_key,
        ),
        dtype=parse_dtype(dtype),
        device=parse_device(device),
        quantization=quantize,
        double_quantization=double_quantize,
        name=name,
        max_length=max_length,
        cache_tokens=cache_tokens,
        idle_timeout=idle_timeout,
        quota=quota,
        max_message=max_message,
        drain_timeout=drain_timeout,
        compile=compile_,
    )
    run(_serve(options))


async def _serve(options: "ServeOptions") -> None:
    from peer.server import Server

    stop = stop_on_signals()
    server = await unless_stopped(Server.start(options), stop)
    if server is not None:
        span = f"blocks={server.span.start}:{server.span.end}"
        say_ready(server.member.addresses, f"{span} model={options.checkpoint.model_id.name}")
        await server.run(stop)
    leave_at_once()


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
