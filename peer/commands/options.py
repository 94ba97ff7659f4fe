"""Options that commands share: parsing and checking what a user typed."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from bootstrap.options import InitialPeers as InitialPeers
from bootstrap.options import SwarmKeyFile as SwarmKeyFile
from bootstrap.options import need_initial_peers as need_initial_peers
from protocol.errors import BadUsage, first_line
from protocol.records import MAX_NAME

if TYPE_CHECKING:
    import torch

# torch takes seconds to import: not for `peer --help`.

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")]
Identity = Annotated[Path | None, typer.Option(metavar="FILE", help="Key file of this member; made if missing.")]
Announce = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDRESS", help="Address to announce instead of those found (may be repeated)."),
]


def _load_defaults(context: typer.Context, value: Path | None) -> Path | None:
    if value is None:
        return None
    try:
        # All values as text, for the options to parse: YAML 1.1 takes 12:24 for 744, sixties and units.
        options = yaml.load(value.read_text(), yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadUsage(f"--config {value} cannot be read as YAML ({first_line(error)}).") from error
    if not isinstance(options, dict):
        raise BadUsage(f"--config {value} must hold a mapping of options to values.")
    # By the names that people type: Python's differ where they would hide a built-in, as for --json.
    known = {name.lstrip("-").replace("-", "_"): option for option in context.command.params for name in option.opts}
    defaults = {}
    for key, item in options.items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise BadUsage(f"--config {value}: {name!r} is no option of `peer {context.info_name}`.{hint}")
        is_one_of_many = getattr(known[name], "multiple", False) and not isinstance(item, list)
        defaults[str(known[name].name)] = [item] if is_one_of_many else item
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.yaml", callback=_load_defaults, is_eager=True, help="A YAML file with these options."
    ),
]


def parse_blocks(text: str | None, total: int | None = None) -> range | None:
    """`0:12` as a range. Raises `BadUsage` when it is malformed, empty, or not in a model of `total` blocks."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text.strip())
    if not match:
        raise BadUsage(f"--blocks {text!r} is not a span; expected START:END, such as 0:12.")
    blocks = range(int(match[1]), int(match[2]))
    if not blocks:
        raise BadUsage(f"--blocks {text} is empty; END must be greater than START.")
    if total is not None and blocks.stop > total:
        raise BadUsage(f"--blocks {text} is out of range: the model has blocks 0:{total}.")
    return blocks


def parse_name(text: str) -> str:
    """A peer's name. Raises `BadUsage` for one that a record cannot hold."""
    if len(text) > MAX_NAME or not text.isprintable():
        raise BadUsage(f"--name must be at most {MAX_NAME} printable characters.")
    return text


def parse_dtype(text: str) -> "torch.dtype | None":
    """A dtype by name; `auto` is `None`. Raises `BadUsage`."""
    from protocol.tensors import COMPUTE_DTYPES

    return COMPUTE_DTYPES.get(one_of("--dtype", text, ("auto", *COMPUTE_DTYPES)))


def parse_device(text: str) -> str:
    """A device that is there; `auto` is the first GPU, else the CPU. Raises `BadUsage`."""
    import torch

    if text == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadUsage(f"--device {text} is not usable on this machine ({first_line(error)[:100]}).") from error
    return text


def one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """`value` when it is among `choices`. Raises `BadUsage`."""
    if value not in choices:
        raise BadUsage(f"{option} {value!r} is unknown; expected one of {', '.join(choices)}.")
    return value


class LazyGroup(typer.core.TyperGroup):
    """Also offers the client's commands, and imports the client only when one of them is asked for."""

    lazy = ("generate", "tune", "merge", "certify")

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands' names."""
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        from client.commands.app import app

        return typer.main.get_group(app).get_command(ctx, cmd_name)
