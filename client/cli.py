"""The commands that use a swarm: `peer generate`. Offered through the `peer` command, which imports this lazily."""

from typing import Annotated, Any

import typer

from protocol.errors import BadUsage

app = typer.Typer(add_completion=False)


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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="For sampling.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter: a folder or hub name.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of what this machine holds; default: the checkpoint's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Generate text through a swarm, streamed as it comes."""
    import torch
    from transformers import TextStreamer

    from client.text import encode_prompt, load_tokenizer

    if not initial_peers:
        raise BadUsage("Give the address of a member with --initial-peers; `peer serve` prints it when it is ready.")
    tokenizer = load_tokenizer(model, revision)
    swarm_model = load_model(model, initial_peers, dtype=dtype, revision=revision, adapter=adapter)
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
    model: str, initial_peers: list[str], *, dtype: str | None = None, revision: str | None = None,
    adapter: str | None = None,
) -> Any:  # fmt: skip
    """The swarm's model, with an adapter on it when one is named. Raises `BadUsage` for an unusable adapter."""
    from client import AutoDistributedModelForCausalLM

    swarm_model = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=initial_peers, dtype=dtype, revision=revision
    )
    if adapter is None:
        return swarm_model
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(swarm_model, adapter).eval()
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise BadUsage(f"--adapter {adapter} cannot be put on {model}: {str(error).splitlines()[0]}") from error
