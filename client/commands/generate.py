"""`peer generate`: text through a swarm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bootstrap.options import Discovery, InitialPeers, SwarmName, as_model, find_swarm
from client.commands.device import Device, enough_memory
from protocol.errors import BadUsage, first_line


def generate(
    model: Annotated[
        str, typer.Argument(parser=as_model, help="A Hugging Face folder, a model that the swarm has, or a hub name.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    initial_peers: InitialPeers = None,
    swarm: SwarmName = None,
    discovery: Discovery = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="For sampling.")] = None,
    adapter: Annotated[
        str | None, typer.Option(parser=as_model, metavar="ADAPTER", help="A PEFT adapter: a folder or hub name.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of what this machine holds; default: the checkpoint's.")] = None,
    device: Device = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Revision of a hub model; default: the one that the adapter was trained on.")
    ] = None,
) -> None:
    """Generate text through a swarm, streamed as it comes."""
    find_swarm(swarm, initial_peers, discovery)  # what is wrong with them need not wait
    import torch

    from client.model.load import local_name
    from client.tokenizer import encode_prompt, load_adapted_tokenizer, load_tokenizer, vocabulary_size
    from protocol.model.checkpoint import open_checkpoint

    model = local_name(model, revision, initial_peers=initial_peers, swarm=swarm, discovery=discovery)
    if adapter is None:
        tokenizer = load_tokenizer(model, revision)
    else:
        revision = _revision(model, revision, adapter)
        tokenizer = load_adapted_tokenizer(adapter, model, revision)
    inputs = encode_prompt(tokenizer, prompt, chat, vocabulary_size(open_checkpoint(model, revision).config))
    swarm_model = _load_model(
        model, initial_peers, swarm, discovery, dtype=dtype, device=device, revision=revision, adapter=adapter
    )
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    with enough_memory("give --device cpu"):
        print_text(swarm_model, tokenizer, inputs, **sampling, max_new_tokens=max_new_tokens)


def print_text(model: Any, tokenizer: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Have `model` go on from `inputs`, and print the text as it comes; beams are known at the end only.

    Returns the tokens (1, all tokens). `options` of `generate` come before what the checkpoint's generation_config.json
    says. Raises `BadUsage` where that says what cannot be done.
    """
    import torch
    from transformers import TextStreamer

    from client.tune.running.samples import one_text

    has_beams = (model.generation_config.num_beams or 1) > 1
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    streamer = None if has_beams else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with torch.no_grad():
            tokens = model.generate(**inputs, **options, **one_text(model, tokenizer), streamer=streamer)
    except ValueError as error:  # Transformers' for what a generation cannot be
        raise BadUsage(
            f"This model's generation_config.json asks for what cannot be done here ({first_line(error)})."
        ) from error
    if has_beams:
        print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return tokens


def _revision(model: str, revision: str | None, adapter: str) -> str | None:
    """The revision of the model to put the adapter on; says on stderr what the adapter says otherwise."""
    from client.merge.adapter import CONFIG_FILE, check_is_adapter
    from client.merge.base import read_json
    from client.merge.origin import choose_revision
    from protocol.model.checkpoint import find_file

    check_is_adapter(Path(adapter))
    file = find_file(adapter, CONFIG_FILE)
    try:
        described = {} if file is None else read_json(file, "a PEFT adapter folder")
    except BadUsage:
        described = {}  # PEFT will say what is wrong with it
    chosen, notes = choose_revision(described, model, revision)
    for note in notes:
        typer.echo(note, err=True)
    return chosen


def _load_model(
    model: str, initial_peers: Sequence[str] | None, swarm: str | None, discovery: bool, *, dtype: str | None,
    device: str, revision: str | None, adapter: str | None,
) -> Any:  # fmt: skip
    """The swarm's model, with an adapter on it when one is named. Raises `BadUsage` for an unusable adapter."""
    from client import AutoDistributedModelForCausalLM

    swarm_model = AutoDistributedModelForCausalLM.from_pretrained(
        model,
        initial_peers=initial_peers,
        swarm=swarm,
        discovery=discovery,
        dtype=dtype,
        device=device,
        revision=revision,
    )
    if adapter is None:
        return swarm_model
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(swarm_model, adapter).eval()
    except (ValueError, OSError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise BadUsage(f"--adapter {adapter} cannot be put on {model} ({_misfit(error)}).") from error


def _misfit(error: Exception) -> str:
    """Why an adapter does not load; PEFT's first line does not tell when sizes differ."""
    from client.merge.adapter import find_mismatch

    if isinstance(error, IndexError):
        return f"it trains tokens that the model has no embeddings for: {first_line(error)}"
    mismatch = find_mismatch(error)
    if mismatch is None:
        return first_line(error)
    name, given, needed = mismatch
    return f"it was trained on another model: its tensor {name} is {given}, and here it must be {needed}"
