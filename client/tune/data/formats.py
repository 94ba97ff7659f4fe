"""Rows to records: the five formats people keep their data in, told apart by their columns, in three common forms.

Alpaca, messages and ShareGPT become a `Conversation`, prompt/completion a `Completion` (or a `Conversation`, where both
hold messages, as TRL has it), text a `Text`. Column and role names follow LLaMA-Factory, Axolotl and TRL.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from client.tune.data.files import Row
from client.tune.errors import DataError

FormatName = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text"]
Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `learned` says that the loss counts it (the assistant's, in `train_on: answers`)."""

    role: Role
    content: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, at least one of them learned."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text and what is to follow it, without any chat markup."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """A text learned whole. `whole_file`: cut it in windows rather than refuse it as too long."""

    text: str
    whole_file: bool


Record = Conversation | Completion | Text


@dataclass(frozen=True, slots=True)
class Format:
    """A format's name, the columns that mark it, those it may have, and its conversion."""

    name: FormatName
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[["_Fields"], Record]

    def describe(self, columns: Mapping[str, str]) -> str:
        """The name and the columns that mark it, as they are called in the files."""
        return f"{self.name} ({', '.join(columns.get(name, name) for name in self.required)})"


class _Fields:
    """One row's fields under our names, read with the checks that make an error name its place."""

    def __init__(self, row: Row, columns: Mapping[str, str]) -> None:
        # A column that the user calls by another name is never taken from the one that bears ours.
        elsewhere = columns.keys() | set(columns.values())
        self.place = row.place
        self.whole_file = row.whole_file
        self._values = {name: value for name, value in row.fields.items() if name not in elsewhere}
        self._values.update({ours: row.fields[name] for ours, name in columns.items() if name in row.fields})

    def names(self) -> set[str]:
        return set(self._values)

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {name!r} must be text, not {type(value).__name__}")
        return value

    def answer(self, name: str) -> str:
        text = self.text(name)
        if not text.strip():
            raise DataError(f"{self.place} has an empty answer ({name!r}); give it one or remove the record")
        return text

    def items(self, name: str) -> list[Any]:
        value = self._values.get(name)
        if not isinstance(value, list):
            raise DataError(f"{self.place}: {name!r} must be a list, not {type(value).__name__}")
        return value

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def holds_list(self, name: str) -> bool:
        return isinstance(self._values.get(name), list)


def _alpaca(fields: _Fields) -> Record:
    turns = []
    if fields.text("system"):
        turns.append(Turn("system", fields.text("system"), learned=False))
    for pair in fields.items("history") if fields.has("history") else ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(part and isinstance(part, str) for part in pair)):
            raise DataError(f"{fields.place}: 'history' must be a list of pairs [instruction, answer]")
        turns += [Turn("user", pair[0], learned=False), Turn("assistant", pair[1], learned=True)]
    question = "\n".join(part for part in (fields.text("instruction"), fields.text("input")) if part)
    turns += [Turn("user", question, learned=False), Turn("assistant", fields.answer("output"), learned=True)]
    return Conversation(tuple(turns))


def _conversation(column: str) -> Callable[[_Fields], Record]:
    def convert(fields: _Fields) -> Record:
        turns = [_turn(fields.place, item) for item in fields.items(column)]
        if fields.text("system") and not any(turn.role == "system" for turn in turns):
            turns.insert(0, Turn("system", fields.text("system"), learned=False))
        return _checked(fields.place, turns)

    return convert


def _prompt_completion(fields: _Fields) -> Record:
    if not fields.holds_list("prompt") and not fields.holds_list("completion"):
        return Completion(fields.text("prompt"), fields.answer("completion"))
    prompt = [replace(_turn(fields.place, item), learned=False) for item in fields.items("prompt")]
    return _checked(fields.place, prompt + [_turn(fields.place, item) for item in fields.items("completion")])


def _text(fields: _Fields) -> Record:
    return Text(fields.answer("text"), fields.whole_file)


def _turn(place: str, item: object) -> Turn:
    """A message in either spelling: role and content, or ShareGPT's from and value."""
    keys = ("role", "content") if isinstance(item, dict) and "role" in item else ("from", "value")
    if not isinstance(item, dict) or not set(keys) <= item.keys():
        raise DataError(f"{place}: a message must have 'role' and 'content', or 'from' and 'value'")
    name, content = item[keys[0]], item[keys[1]]
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{place}: unknown role {name!r}; known are {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{place}: the content of a message must be text, not {type(content).__name__}")
    if role == "assistant" and not content.strip():
        raise DataError(f"{place} has an empty answer (a message of {name!r}); give it one or remove the record")
    return Turn(role, content, learned=role == "assistant")


def _checked(place: str, turns: list[Turn]) -> Conversation:
    if not any(turn.learned for turn in turns):
        raise DataError(f"{place} has no message of the assistant: there is nothing to learn in it")
    spoken = [turn for turn in turns if turn.role != "system"]
    if spoken[0].role == "assistant":
        raise DataError(f"{place} begins with a message of the assistant; it must begin with one of the user")
    return Conversation(tuple(turns))


# In the order of recognition: Alpaca's own file has a "text" column besides its others.
FORMATS = (
    Format("messages", ("messages",), ("system",), _conversation("messages")),
    Format("sharegpt", ("conversations",), ("system",), _conversation("conversations")),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Format("prompt_completion", ("prompt", "completion"), (), _prompt_completion),
    Format("text", ("text",), (), _text),
)
COLUMNS = tuple(dict.fromkeys(column for known in FORMATS for column in known.required + known.optional))
assert {known.name for known in FORMATS} == set(get_args(FormatName))


class Converter:
    """Turns the rows of a run into records, all of the one format that the first row settles.

    Args:
        name: the format, or "auto" to tell it by the first row's columns.
        columns: our column name -> the name in the files.
    """

    def __init__(self, name: FormatName | Literal["auto"], columns: Mapping[str, str]) -> None:
        self._format = next((known for known in FORMATS if known.name == name), None)
        self._columns = columns

    def __call__(self, row: Row) -> Record:
        """The row as a record.

        Raises:
            DataError: its columns are of no known format or lack one of this run's, or a value is not what it must be.
        """
        fields = _Fields(row, self._columns)
        if self._format is None:
            self._format = next((known for known in FORMATS if set(known.required) <= fields.names()), None)
        if self._format is None or not set(self._format.required) <= fields.names():
            raise self._wrong_columns(row)
        return self._format.convert(fields)

    def _wrong_columns(self, row: Row) -> DataError:
        found = ", ".join(repr(name) for name in row.fields) or "none"
        wanted = (self._format,) if self._format else FORMATS
        known = ", ".join(one.describe(self._columns) for one in wanted)
        return DataError(f"{row.place} has the columns {found}; known are {known}; name yours under data.columns")
