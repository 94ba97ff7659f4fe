"""Rows to records: the five formats people keep their data in, told apart by their columns, in three common forms.

Alpaca, messages and ShareGPT become a `Conversation`, prompt/completion a `Completion` (or a `Conversation`, where both
hold messages, as TRL has it), text a `Text`. Column, key and role names follow LLaMA-Factory, Axolotl, TRL and OpenAI.
A message keeps all its keys: what of them is shown is for the chat template to say.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from client.tune.data.files import Row
from client.tune.data.notes import Notes
from client.tune.errors import DataError

FormatName = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Content = str | list[dict[str, Any]] | None
"""Of a message: text, parts `{"type": "text", "text": ...}`, or nothing beside tool calls."""

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("developer",), "developer"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "environment", "ipython"), "tool"),
}
_CALLS = ("function_call", "tool_call")
"""Roles whose text is a tool call in JSON (LLaMA-Factory, ms-swift)."""
_SWITCHES = ("train", "training", "loss")
"""Keys that say of any message whether it is learned (Axolotl, ms-swift)."""
_WEIGHTS = ("weight", "loss_weight")
"""Keys that can take an answer out of the loss (OpenAI, Mistral, LLaMA-Factory)."""
_DETAILS = ("train_detail", "training_detail")
"""Keys that say it of parts of a message (Axolotl)."""

_NO_JSON = (ValueError, RecursionError)
"""What `json.loads` raises; the second where it is nested too deeply."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `learned` says that the loss counts it (in `train_on: answers`), `masked` that the record itself
    forbids it; `more` are the message's other keys, as a chat template is to see them.
    """

    role: Role
    content: Content
    learned: bool
    more: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False

    @property
    def text(self) -> str:
        """The content as one text; its parts stand together as chat templates put them."""
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content)
        return self.content or ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, at least one of them learned. `tools`: JSON schemas of the functions that may be called."""

    turns: tuple[Turn, ...]
    tools: list[dict[str, Any]] | None = None


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

    def __init__(self, row: Row, columns: Mapping[str, str], notes: Notes) -> None:
        # A column that the user calls by another name is never taken from the one that bears ours.
        elsewhere = columns.keys() | set(columns.values())
        self.place = row.place
        self.notes = notes
        self.whole_file = row.whole_file
        self._values = {name: value for name, value in row.fields.items() if name not in elsewhere}
        self._values.update({ours: row.fields[name] for ours, name in columns.items() if name in row.fields})

    def names(self) -> set[str]:
        return set(self._values)

    def note_unread(self, read: set[str]) -> None:
        for name in sorted(self._values.keys() - read):
            if self._values[name] not in (None, "", [], {}):
                self.notes.count("not read", f"the column {name!r}")

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

    def tools(self) -> list[dict[str, Any]] | None:
        """The tools, which may be a JSON text, as a table's cell is."""
        value = self._values.get("tools") or None
        if isinstance(value, str):
            try:
                value = json.loads(value) or None
            except _NO_JSON as error:
                raise DataError(f"{self.place}: 'tools' is not valid JSON: {error}") from error
        if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
            raise DataError(f"{self.place}: 'tools' must be a list of JSON schemas, one for each function")
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
    return Conversation(tuple(turns), fields.tools())


def _conversation(column: str) -> Callable[[_Fields], Record]:
    def convert(fields: _Fields) -> Record:
        turns = [_turn(fields, item) for item in fields.items(column)]
        if fields.text("system") and not any(turn.role in ("system", "developer") for turn in turns):
            turns.insert(0, Turn("system", fields.text("system"), learned=False))
        return _checked(fields, turns)

    return convert


def _prompt_completion(fields: _Fields) -> Record:
    if not fields.holds_list("prompt") and not fields.holds_list("completion"):
        if fields.has("tools"):
            fields.notes.count("not read", "the column 'tools'")
        return Completion(fields.text("prompt"), fields.answer("completion"))
    prompt = [replace(_turn(fields, item), learned=False) for item in fields.items("prompt")]
    return _checked(fields, prompt + [_turn(fields, item) for item in fields.items("completion")])


def _text(fields: _Fields) -> Record:
    return Text(fields.answer("text"), fields.whole_file)


def _turn(fields: _Fields, item: object) -> Turn:
    """A message in either spelling: role and content, or ShareGPT's from and value."""
    place = fields.place
    keys = ("role", "content") if isinstance(item, dict) and "role" in item else ("from", "value")
    if not isinstance(item, dict) or not ({keys[0]} if "tool_calls" in item else set(keys)) <= item.keys():
        raise DataError(f"{place}: a message must have 'role' and 'content', or 'from' and 'value'")
    name, content = item[keys[0]], item.get(keys[1])
    spelling = name.strip().lower().replace("-", "_") if isinstance(name, str) else ""
    role = _ROLES.get(spelling)
    if role is None:
        raise DataError(f"{place}: unknown role {name!r}; known are {', '.join(_ROLES)}")
    if name != role:
        fields.notes.count("roles", f"{name!r} read as {role}")
    more = {
        key: value
        for key, value in item.items()
        if value is not None and key not in (*keys, *_SWITCHES, *_WEIGHTS, *_DETAILS, "function_call")
    }
    if spelling in _CALLS:
        content, more["tool_calls"] = None, _calls_in(place, name, content)
    elif item.get("function_call"):  # as OpenAI had it before tools
        more["tool_calls"] = [{"type": "function", "function": item["function_call"]}]
    calls = more.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"{place}: 'tool_calls' of a message must be a list, not {type(calls).__name__}")
    if calls:
        more["tool_calls"] = [_parsed(call) for call in calls]
    turn = Turn(role, _content(place, content, optional=bool(calls)), role == "assistant", more)
    return _weighed(place, item, turn)


def _content(place: str, content: object, optional: bool) -> Content:
    if isinstance(content, str) or (content is None and optional):
        return content
    if not isinstance(content, list):
        raise DataError(f"{place}: the content of a message must be text, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(
                f'{place}: a part of a message must be text, {{"type": "text", "text": …}}, and this one is {kind!r}'
            )
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _weighed(place: str, item: Mapping[str, Any], turn: Turn) -> Turn:
    """The turn, learned or not as the message's own marks have it."""
    for key in _DETAILS:
        if item.get(key):
            raise DataError(
                f"{place}: {key!r} learns parts of a message, which is not supported; mark it whole ('train')"
            )
    marks = {key: item[key] for key in (*_SWITCHES, *_WEIGHTS) if item.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):
            raise DataError(f"{place}: {key!r} of a message must be 0 or 1, false or true, not {value!r}")
    masked = not all(marks.values())
    learned = not masked and (turn.learned or any(key in marks for key in _SWITCHES))
    if turn.role == "assistant" and learned and not turn.text.strip() and not turn.more.get("tool_calls"):
        raise DataError(f"{place} has an empty answer (a message of 'assistant'); give it one or remove the record")
    return replace(turn, learned=learned, masked=masked)


def _calls_in(place: str, name: str, content: object) -> list[dict[str, Any]]:
    """The tool calls that a text holds: `{"name": ..., "arguments": ...}`, or a list of such."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except _NO_JSON:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise DataError(f'{place}: a message of {name!r} must hold JSON, {{"name": …, "arguments": …}} or a list of it')
    return [{"type": "function", "function": call} for call in calls]


def _parsed(call: Any) -> Any:
    """A tool call with its arguments as an object. OpenAI has them as a JSON text, which templates would quote once
    more; servers (vLLM) parse them before they render, too.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except _NO_JSON:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _checked(fields: _Fields, turns: list[Turn]) -> Conversation:
    if not any(turn.learned for turn in turns):
        masked = any(turn.masked for turn in turns)
        reason = "learns no message, by its own marks" if masked else "has no message of the assistant"
        raise DataError(f"{fields.place} {reason}: there is nothing to learn in it")
    spoken = [turn for turn in turns if turn.role not in ("system", "developer")]
    if spoken and spoken[0].role == "assistant":
        fields.notes.count("conversations", "begin with the assistant")
    return Conversation(tuple(turns), fields.tools())


# In the order of recognition: Alpaca's own file has a "text" column besides its others.
FORMATS = (
    Format("messages", ("messages",), ("system", "tools"), _conversation("messages")),
    Format("sharegpt", ("conversations",), ("system", "tools"), _conversation("conversations")),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history", "tools"), _alpaca),
    Format("prompt_completion", ("prompt", "completion"), ("tools",), _prompt_completion),
    Format("text", ("text",), (), _text),
)
COLUMNS = tuple(dict.fromkeys(column for known in FORMATS for column in known.required + known.optional))
assert {known.name for known in FORMATS} == set(get_args(FormatName))


class Converter:
    """Turns the rows of a run into records, all of the one format that the first row settles.

    Args:
        name: the format, or "auto" to tell it by the first row's columns.
        columns: our column name -> the name in the files.
        notes: where to count what is read otherwise than it stands in a record, or not read.
    """

    def __init__(
        self, name: FormatName | Literal["auto"], columns: Mapping[str, str], notes: Notes | None = None
    ) -> None:
        self._notes = notes or Notes()
        self._format = next((known for known in FORMATS if known.name == name), None)
        self._is_told = self._format is not None
        self._columns = columns

    def __call__(self, row: Row) -> Record:
        """The row as a record.

        Raises:
            DataError: its columns are of no known format or lack one of this run's, or a value is not what it must be.
        """
        fields = _Fields(row, self._columns, self._notes)
        if self._format is None:
            self._format = next((known for known in FORMATS if set(known.required) <= fields.names()), None)
        if self._format is None or not set(self._format.required) <= fields.names():
            raise self._wrong_columns(row)
        fields.note_unread({*self._format.required, *self._format.optional})
        return self._format.convert(fields)

    def _wrong_columns(self, row: Row) -> DataError:
        found = ", ".join(repr(name) for name in row.fields) or "none"
        if self._format and not self._is_told:
            return DataError(
                f"{row.place} has the columns {found}, and the first record is {self._format.describe(self._columns)}:"
                " records that are read together have one format; write them all in that one, or in messages"
            )
        wanted = (self._format,) if self._format else FORMATS
        known = ", ".join(one.describe(self._columns) for one in wanted)
        return DataError(f"{row.place} has the columns {found}; known are {known}; name yours under data.columns")
