"""`peer certify`: what each wire codec does to a model, measured on this machine alone."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bootstrap.options import as_model, as_path
from client.commands.device import Device, enough_memory


def certify(
    model: Annotated[str, typer.Argument(parser=as_model, help="A Hugging Face folder or hub name.")],
    spans: Annotated[int, typer.Option(min=1, help="Peers in a row; hidden states cross once more than that.")] = 2,
    data: Annotated[
        Path | None,
        typer.Option(parser=as_path, metavar="FILE", help="The text, as for `peer tune`; default: one of ours."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of text to compare distributions on.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Of LoRA training with each codec.")] = 20,
    dtype: Annotated[str, typer.Option(help="That peers compute in; auto: the checkpoint's.")] = "auto",
    device: Device = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what each wire codec does to a model, on this machine alone, and say which are safe for it."""
    from transformers.utils.logging import disable_progress_bar

    from client.certify.certificate import Extent
    from client.certify.measure import measure
    from client.certify.table import as_table
    from client.model.load import named_dtype
    from client.tune.data.persona import persona_path
    from protocol.machine.devices import choose_device
    from protocol.machine.terminal import new_console

    if dtype != "auto":
        named_dtype(dtype)
    disable_progress_bar()
    console = new_console(stderr=True)
    with enough_memory("give --device cpu"):
        certificate = measure(
            model, revision, dtype, choose_device(device), data or persona_path(), Extent(spans, tokens, steps),
            lambda what: console.print(f"[dim]measuring: {what}[/dim]"),
        )  # fmt: skip
    if as_json:
        print(json.dumps(certificate.as_json(), indent=2))
    else:
        new_console().print(as_table(certificate))
