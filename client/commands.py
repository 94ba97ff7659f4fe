"""The client's commands: `generate`, `tune`, `merge`, `certify`. `peer.commands.options` adds them to the `peer` command."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from protocol.errors import BadUsage, first_line

app = typer.Typer(add_completion=False)
SwarmKeyFile = Annotated[
    Path | None,
    typer.Option("--swarm-key", metavar="FILE", help="Key file of a private swarm (`peer key create FILE`)."),
]


@app.callback()
def _group() -> None:
    """Using a swarm."""


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    initial_peers: Annotated[
        list[str] | None, typer.Option("--initial-peers", metavar="ADDRESS", help="Address of a member of the swarm.")
    ] = None,
    swarm_key: SwarmKeyFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="For sampling.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter: a folder or hub name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of what this machine holds; default: the checkpoint's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Generate text through a swarm, streamed as it comes."""
    import torch
    from transformers import TextStreamer

    from client.tokenizer import encode_prompt, load_tokenizer

    if not initial_peers:
        raise BadUsage("Give the address of a member with --initial-peers; `peer serve` prints it when it is ready.")
    tokenizer = load_tokenizer(model, revision)
    swarm_model = load_model(model, initial_peers, swarm_key, dtype=dtype, revision=revision, adapter=adapter)
    inputs = encode_prompt(tokenizer, prompt, chat)
    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        swarm_model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)


def load_model(
    model: str, initial_peers: list[str], swarm_key: Path | None = None, *, dtype: str | None = None,
    revision: str | None = None, adapter: str | None = None,
) -> Any:  # fmt: skip
    """The swarm's model, with an adapter on it when one is named. Raises `BadUsage` for an unusable adapter."""
    from client import AutoDistributedModelForCausalLM

    swarm_model = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=initial_peers, swarm_key=swarm_key, dtype=dtype, revision=revision
    )
    if adapter is None:
        return swarm_model
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(swarm_model, adapter).eval()
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BadUsage(f"--adapter {adapter} cannot be put on {model} ({_misfit(error)}).") from error


def _misfit(error: Exception) -> str:
    """Why an adapter does not load; PEFT's first line does not tell when sizes differ."""
    from client.merge.adapter import find_mismatch

    mismatch = find_mismatch(error)
    if mismatch is None:
        return first_line(error)
    name, given, needed = mismatch
    return f"it was trained on another model: its tensor {name} is {given}, and here it must be {needed}"


@app.command()
def tune(
    config: Annotated[Path | None, typer.Argument(help="A YAML file that describes the run; see --init.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it: trainer.steps=100 ...")] = None,
    swarm_key: SwarmKeyFile = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint of this run.")] = False,
    plan: Annotated[bool, typer.Option(help="Show what the run would do, and stop.")] = False,
    init: Annotated[bool, typer.Option(help="Write a commented example file (to CONFIG, or to the screen).")] = False,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of the file.")] = False,
) -> None:
    """Fine-tune an adapter through a swarm, as one file describes it."""
    changes = list(overrides or ())
    if config is not None and _is_override(str(config)):  # a run that is described by overrides alone
        config, changes = None, [str(config), *changes]
    if swarm_key is not None:
        changes.append(f"swarm_key={json.dumps(str(swarm_key))}")  # YAML takes JSON
    if init:
        _write_example(config)
    elif schema:
        from client.tune.description.config import json_schema

        print(json.dumps(json_schema(), indent=2))
    else:
        from client.tune.command import run_tune

        run_tune(config, changes, resume, plan)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter: a folder or hub name.")],
    base: Annotated[str, typer.Option(help="The model it was trained on: a folder or hub name.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged model goes.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as the base is stored.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub base.")] = None,
) -> None:
    """Merge an adapter into its base model, block by block, in bounded memory."""
    from client.merge.run import merge_adapter
    from client.model.load import named_dtype

    chosen_dtype = None if dtype == "auto" else named_dtype(dtype)
    merge_adapter(adapter, base, out, revision=revision, dtype=chosen_dtype, report=print)


@app.command()
def certify(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    spans: Annotated[int, typer.Option(min=1, help="Peers in a row; hidden states cross once more than that.")] = 2,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text, as for `peer tune`; default: a small one of ours.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of text to compare distributions on.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Of LoRA training with each codec.")] = 20,
    dtype: Annotated[str, typer.Option(help="That peers compute in; auto: the checkpoint's.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what each wire codec does to a model, on this machine alone, and say which are safe for it."""
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from client.certify.certify import Plan, certify
    from client.certify.table import as_table
    from client.model.load import named_dtype
    from client.tune.data.persona import persona_path

    if dtype != "auto":
        named_dtype(dtype)
    disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    certificate = certify(
        model, revision, dtype, data or persona_path(), Plan(spans, tokens, steps),
        lambda what: console.print(f"[dim]measuring: {what}[/dim]"),
    )  # fmt: skip
    if as_json:
        print(json.dumps(certificate.as_json(), indent=2))
    else:
        Console().print(as_table(certificate))


def _is_override(argument: str) -> bool:
    """Whether it is `a.b=c`: the path of a file may have a `=` in it too."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and "/" not in key and not os.path.isfile(argument)  # Path's raises where a name is too long


def _write_example(path: Path | None) -> None:
    from client.tune.description.example import example_yaml

    if path is None:
        print(example_yaml(), end="")
        return
    try:
        with path.open("x") as file:
            file.write(example_yaml())
    except OSError as error:
        raise BadUsage(f"{path} cannot be written: {error.strerror}.") from error
    print(f"Wrote {path}; change it, then run `peer tune {path}`.")
