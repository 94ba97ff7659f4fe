"""Options of a command that are declared as the fields of a dataclass.

A field annotated as Typer wants it is an option on the command line and in a `--config` file, and the place where its
value is found. Typer itself makes options of a command's parameters only.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

Parameter = inspect.Parameter


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with an option for each field of its parameters that are dataclasses.

    A field that is a dataclass itself has its own fields taken. All fields need defaults.
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
