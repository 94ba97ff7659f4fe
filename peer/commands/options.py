"""Options of the `peer` command that are about the command line itself: `--config`, and commands of other rooms."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bootstrap.options import as_path
from protocol.errors import BadUsage, first_line


def _load_defaults(context: typer.Context, value: Path | None) -> Path | None:
    if value is None:
        return None
    try:
        # All values as text, for the options to parse: YAML 1.1 takes 12:24 for 744, sixties and units.
        options = yaml.load(value.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
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
        "--config", parser=as_path, metavar="FILE.yaml", callback=_load_defaults, is_eager=True,
        help="A YAML file with these options.",
    ),
]  # fmt: skip


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
