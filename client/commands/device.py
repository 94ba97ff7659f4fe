"""The option --device of the commands that compute on this machine, and what they say where its memory does not do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from protocol.errors import BadUsage

Device = Annotated[str, typer.Option(help="For what this machine holds: auto, cpu, cuda:0, ...")]


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Within the block a device that has no memory left ends the command with a sentence, of which `advice` is the end.

    Raises `BadUsage`.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BadUsage(f"The device of this machine has too little memory for this; {advice}.") from error
