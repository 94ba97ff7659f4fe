"""`peer gateway`: OpenAI's HTTP interface to a swarm."""

from pathlib import Path
from typing import Annotated

import typer

from bootstrap.options import Discovery, InitialPeers, SwarmName, as_model, as_path, find_swarm
from client.commands.device import Device, enough_memory
from protocol.errors import BadUsage
from protocol.machine.paths import model_name


def gateway(
    model: Annotated[
        str, typer.Argument(parser=as_model, help="A Hugging Face folder, a model that the swarm has, or a hub name.")
    ],
    initial_peers: InitialPeers = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8080,
    api_key: Annotated[
        Path | None,
        typer.Option(
            parser=as_path, metavar="FILE", help="Keys that are let in, one a line; read again when it changes."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A PEFT adapter to serve as the model NAME (may be repeated)."),
    ] = None,
    adapter_folder: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="DIR", help="Whose folders may be loaded as adapters by a request."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients; default: the folder's or hub's.")] = None,
    prefix_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens whose keys stay on the peers for prompts that begin alike.")
    ] = 32768,
    max_running: Annotated[int, typer.Option(min=1, max=90, help="Texts in the making at once; others wait.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of one request at most.")] = 2 * 2**20,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at once, of all clients.")] = 256,
    max_requests_per_key: Annotated[int, typer.Option(min=1, help="Requests at once of each key.")] = 64,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Of each key; 0: any number.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="That compute here; 0: as many as there are cores.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Of what this machine holds; default: the checkpoint's.")] = None,
    device: Device = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Let programs that speak OpenAI's HTTP use a swarm: chat, completions, adapters as models."""
    find_swarm(swarm, initial_peers, discovery)  # what is wrong with them need not wait
    adapters = dict(_named_folder(each) for each in adapter or ())
    if adapter_folder is not None and not adapter_folder.is_dir():
        raise BadUsage(f"--adapter-folder {adapter_folder} is no folder.")
    try:
        from client.gateway.doors import Limits
        from client.gateway.server import Address, serve
    except ModuleNotFoundError as error:
        raise BadUsage(f"`peer gateway` needs {error.name}: pip install 'hivetune[gateway]'.") from error
    address = Address(host, port, api_key)
    address.check()
    import torch

    from client import AutoDistributedModelForCausalLM
    from client.model.load import local_name

    if threads:
        torch.set_num_threads(threads)
    network = {"initial_peers": initial_peers, "swarm": swarm, "discovery": discovery}
    found = local_name(model, revision, **network)
    with enough_memory("give --device cpu"):
        swarm_model = AutoDistributedModelForCausalLM.from_pretrained(
            found, **network, dtype=dtype, device=device, revision=revision
        )
    serve(
        swarm_model, name or model_name(model), found, revision, address,
        Limits(max_body, max_requests, max_requests_per_key, requests_per_minute),
        adapters=adapters, adapter_folder=adapter_folder, prefix_tokens=prefix_tokens, max_running=max_running,
        max_tokens=max_tokens,
    )  # fmt: skip


def _named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder or not as_path(folder).is_dir():
        raise BadUsage(f"--adapter {text} must be NAME=FOLDER, with the folder of a PEFT adapter.")
    return name, as_path(folder)
