"""What a member that gives weights is told. Imports nothing slow."""

import re
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import BadUsage
from protocol.name import CACHE_SIZE

if TYPE_CHECKING:
    from protocol.model.checkpoint import Checkpoint

_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """How to give and to keep weights. Each field is an option of `peer serve`."""

    model_name: Annotated[
        str | None,
        typer.Option("--model-name", help="What the swarm calls the model of a folder; default: the folder's name."),
    ] = None
    upload_rate: Annotated[
        float,
        typer.Option(
            "--upload-rate", min=1, show_default=False,
            help="Bytes per second of weights that others may fetch from here; default: any.",
        ),
    ] = inf  # fmt: skip
    cache_size: Annotated[
        int,
        typer.Option(
            "--cache-size", min=0, show_default=False,
            help="Bytes that models fetched from other members may take on this disk; default: 200 GB.",
        ),
    ] = CACHE_SIZE  # fmt: skip

    def named(self, checkpoint: "Checkpoint") -> "Checkpoint":
        """The checkpoint under the name that the user gave it. Raises `BadUsage` where that cannot be its name."""
        name = self.model_name
        if name is None:
            return checkpoint
        if checkpoint.source is not None:
            raise BadUsage(f"The swarm calls this model {checkpoint.source.label}; leave out --model-name.")
        if not _NAME.fullmatch(name):
            allowed = "letters, digits, '.', '_' and '-', and one '/' at most"
            raise BadUsage(f"--model-name {name!r} cannot be asked for; use {allowed}.")
        return replace(checkpoint, called=name)
