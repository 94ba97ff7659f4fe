"""Options of the `peer` command that are about the command line itself: `--config`, options that are declared as the
fields of a dataclass, and commands of other rooms."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml

from bootstrap.options import as_path
from protocol.errors import BadUsage, first_line

Parameter = inspect.Parameter


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


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with an option for each field of its parameters that are dataclasses.

    A field annotated as Typer wants it is an option on the command line and in a `--config` file, and the place where
    its value is found: Typer itself makes options of a command's parameters only. A field that is a dataclass itself
    has its own fields taken. All fields need defaults.
    """
    hints = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters

    @wraps(command)
    def run(**typed: Any) -> None:
        command(**{name: _filled(hints[name], typed) if is_dataclass(hints[name]) else typed[name] for name in given})

    parameters = [each for name, parameter in given.items() for each in _parameters(parameter, hints[name])]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameters(parameter: Parameter, hint: Any) -> Iterator[Parameter]:
    if not is_dataclass(hint):
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hint)
        return
    for field, of in _fields(hint):
        default = Parameter.empty if field.default is MISSING else field.default
        yield from _parameters(Parameter(_name(field, of), Parameter.KEYWORD_ONLY, default=default), of)


def _filled(cls: Any, typed: dict[str, Any]) -> Any:
    """The dataclass, of what the user typed."""
    return cls(
        **{
            field.name: _filled(of, typed) if is_dataclass(of) else typed[_name(field, of)]
            for field, of in _fields(cls)
        }
    )


def _fields(cls: Any) -> Iterator[tuple[Field[Any], Any]]:
    """A dataclass's fields and what they are annotated with."""
    hints = get_type_hints(cls, include_extras=True)
    return ((field, hints[field.name]) for field in fields(cls))


def _name(field: Field[Any], annotation: Any) -> str:
    """The parameter's name: as its option is called, where that is said, for two dataclasses may share a field's."""
    (option, *_) = getattr(annotation, "__metadata__", (None,))
    said = getattr(option, "default", None)  # where Typer keeps the first name
    return said.lstrip("-").replace("-", "_") if isinstance(said, str) else field.name


class LazyGroup(typer.core.TyperGroup):
    """Also offers the client's commands, and imports the client only when one of them is asked for."""

    lazy = ("generate", "gateway", "tune", "merge", "certify")

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands' names."""
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        from client.commands.app import app

        return typer.main.get_group(app).get_command(ctx, cmd_name)
