"""Reading data files and telling their formats, and the sentence for each thing that can be wrong with them."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from client.tune.data.files import Row, read_rows
from client.tune.data.formats import Completion, Conversation, Converter, Record, Text
from client.tune.data.notes import Notes
from client.tune.errors import DataError

RECORDS = [{"instruction": "a", "output": "b"}, {"instruction": "ü\nc", "output": "d, e"}]


def save(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(path: Path) -> list[Any]:
    return [dict(row.fields) for row in read_rows([path])]


def failure(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows([path]))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_json_jsonl_csv_tsv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    lines = "\n\n".join(json.dumps(record) for record in RECORDS)
    paths = [
        save(tmp_path, "a.json", json.dumps(RECORDS, indent=2)),
        save(tmp_path, "a.jsonl", "\ufeff" + lines),
        save(tmp_path, "a.ndjson", lines),
        save(tmp_path, "a.csv", 'instruction,output\r\na,b\r\n"ü\nc","d, e"\r\n'),
        save(tmp_path, "a.tsv", 'instruction\toutput\na\tb\n"ü\nc"\td, e\n'),
        tmp_path / "a.parquet",
    ]
    parquet.write_table(arrow.Table.from_pylist(RECORDS), paths[-1])
    paths += [save(tmp_path, f"{path.name}.gz", gzip.compress(path.read_bytes())) for path in paths]
    for path in paths:
        assert fields(path) == RECORDS, path
    assert len(list(read_rows(paths))) == 2 * len(paths)


def test_a_folder_and_a_pattern_are_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", ".hidden.jsonl", "README.md", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        line = json.dumps({"text": name}).encode()
        save(tmp_path, name, gzip.compress(line, mtime=0) if name.endswith(".gz") else line)
    assert [row["text"] for row in fields(tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert [row["text"] for row in fields(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(fields(tmp_path / "**" / "*.jsonl")) == 3
    save(tmp_path, "LICENSE.txt", "no data")
    assert failure(tmp_path).startswith("is a folder with files of several types (.jsonl, .txt); give a pattern such")
    assert failure(tmp_path / "*.csv") == "matches no file"
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty").startswith("is a folder without data files; known are .json, ")


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "splits"))
    for folder in ("one", "splits"):
        assert failure(tmp_path / folder) == (
            "is a data set that save_to_disk has written, which is not read; write it with to_parquet or to_json"
        )


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = save(tmp_path, "a.TXT", "one\n\ntwo")
    assert list(read_rows([path])) == [Row(str(path), {"text": "one\n\ntwo"}, whole_file=True)]


def test_a_row_knows_its_place(tmp_path: Path) -> None:
    path = save(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.place for row in read_rows([path])] == [f"{path}: line 1", f"{path}: line 3"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "", "holds no records"),
        ("a.json", " [] ", "holds no records"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.csv", "instruction,output\n", "holds no records"),
        ("a.txt", " \n", "holds no records"),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}]', "broken JSON on line 3: Expecting ':' delimiter"),
        ("a.json", '{"a": 1}\n{"a": 2}', "broken JSON on line 2: Extra data; if it holds one object a line, name it"),
        ("a.json", '{"a": 1}', "must hold a list of records; a file with one object a line is named .jsonl"),
        ("a.json", "[" * 100_000, "is nested too deeply"),
        ("a.json", '[{"a": 1}, 3]', "record 2 is no object with named fields"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "broken JSON on line 2: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is no object with named fields"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "is not UTF-8 text on line 2; save it as UTF-8"),
        ("a.json", b'["\xff"]', "is not UTF-8 text (byte 2); save it as UTF-8"),
        ("a.csv", b"a,b\n1,\xff\n", "is not UTF-8 text; save it as UTF-8"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 9000 + b"1,\xff\n", "is not UTF-8 text after line"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3 does not have the 2 cells that the header names"),
        ("a.csv", "a,b\n1,2,3\n", "line 2 does not have the 2 cells that the header names"),
        ("a.csv", 'a,b\n1,"2\n', "broken CSV on line 2: unexpected end of data"),
        ("a.parquet", "PAR1 not", "is not a readable Parquet file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-3], "is not a whole gzip file"),
        ("a.jsonl.gz", '{"text": "a"}', "is not a whole gzip file"),
        ("a.xlsx", "x", "unknown file type '.xlsx'; known are .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt, and"),
        ("a.csv.zst", "x", "unknown file type '.zst'; known are"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert failure(save(tmp_path, name, content)).startswith(expected)


def test_a_missing_file_and_a_data_set_of_a_hub(tmp_path: Path) -> None:
    for name in ("no.json", "tatsu-lab/alpaca"):
        assert failure(tmp_path / name).startswith("there is no such file; known are .json, ")
    assert failure(tmp_path / ("n" * 300)) == "can't be read: File name too long"


def test_parquet_has_no_keys_that_a_record_did_not_have(tmp_path: Path) -> None:
    """It gives every object of a column the keys of all of them, with nulls."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    records = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == records


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert failure(save(tmp_path, "a.parquet", "")).startswith("reading Parquet needs the package pyarrow")


# ---- formats


def convert(values: dict[str, Any], name: Any = "auto", columns: dict[str, str] | None = None) -> Record:
    return Converter(name, columns or {})(Row("place", values))


def turns(values: dict[str, Any], **keywords: Any) -> list[tuple[str, str, bool]]:
    record = convert(values, **keywords)
    assert isinstance(record, Conversation)
    return [(turn.role, turn.text, turn.learned) for turn in record.turns]


def noted(*records: dict[str, Any]) -> dict[str, str]:
    notes = Notes()
    converter = Converter("auto", {}, notes)
    for values in records:
        converter(Row("place", values))
    return dict(notes.lines())


ASKED = [("user", "q", False), ("assistant", "a", True)]


@pytest.mark.parametrize(
    "values",
    [
        {"instruction": "q", "output": "a", "id": 7, "text": "Alpaca's own file has this column too"},
        {"instruction": "q", "input": None, "output": "a", "history": None},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_every_conversational_format_becomes_the_same(values: dict[str, Any]) -> None:
    assert turns(values) == ASKED


def test_alpaca_with_everything() -> None:
    values = {"system": "s", "instruction": "q", "input": "i", "output": "a", "history": [["q0", "a0"]]}
    before = [("system", "s", False), ("user", "q0", False), ("assistant", "a0", True)]
    assert turns(values) == [*before, ("user", "q\ni", False), ("assistant", "a", True)]


def test_sharegpt_system_and_tools() -> None:
    said = [("human", "q"), ("gpt", "call"), ("observation", "42"), ("gpt", "a"), ("human", "thanks")]
    values = {"system": "s", "conversations": [{"from": who, "value": what} for who, what in said]}
    assert [turn[0] for turn in turns(values)] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert [turn[1] for turn in turns(values) if turn[2]] == ["call", "a"]


def test_messages_of_a_prompt_are_not_learned() -> None:
    said = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, {"role": "user", "content": "q"}]
    values = {"prompt": said, "completion": [{"role": "assistant", "content": "a"}]}
    assert [turn[1] for turn in turns(values) if turn[2]] == ["a"]


def test_plain_prompt_completion_and_text() -> None:
    assert convert({"prompt": "p", "completion": "c"}) == Completion("p", "c")
    assert convert({"text": "t"}) == Text("t", whole_file=False)


def test_columns_can_be_named() -> None:
    assert turns({"frage": "q", "antwort": "a"}, columns={"instruction": "frage", "output": "antwort"}) == ASKED
    swapped = turns({"input": "q", "output": "a"}, columns={"instruction": "input"})
    assert swapped == ASKED
    with pytest.raises(DataError, match=r"place has the columns .*; known are .*\(instruction, reply\)"):
        convert({"instruction": "q", "output": "not this"}, columns={"output": "reply"})


def test_the_first_record_settles_the_format() -> None:
    converter = Converter("auto", {})
    converter(Row("one", {"text": "t"}))
    with pytest.raises(DataError) as caught:
        converter(Row("two", {"instruction": "q", "output": "a"}))
    assert str(caught.value) == (
        "two has the columns 'instruction', 'output', and the first record is text (text): records that are"
        " read together have one format; write them all in that one, or in messages"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"frage": 1, "b": 2}, "place has the columns 'frage', 'b'; known are messages (messages), sharegpt"),
        ({}, "place has the columns none; known are"),
        ({"instruction": "q", "output": " "}, "place has an empty answer ('output'); give it one or remove"),
        ({"instruction": "q", "output": None}, "place has an empty answer ('output')"),
        ({"prompt": "q", "completion": ""}, "place has an empty answer ('completion')"),
        ({"text": ""}, "place has an empty answer ('text')"),
        ({"instruction": 3, "output": "a"}, "place: 'instruction' must be text, not int"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "place: 'history' must be a list of pairs"),
        ({"messages": "hello"}, "place: 'messages' must be a list, not str"),
        ({"messages": []}, "place has no message of the assistant"),
        ({"messages": [{"role": "user", "content": "q"}]}, "place has no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "place has an empty answer (a message of 'assistant')"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "place: unknown role 'robot'; known are system, developer, user,",
        ),
        ({"messages": [{"role": ["x"], "content": "a"}]}, "place: unknown role ['x']"),
        ({"messages": [{"role": "user", "content": [1]}]}, "place: a part of a message must be text, "),
        ({"messages": [{"role": "user", "content": 1}]}, "place: the content of a message must be text, not int"),
        ({"messages": [{"role": "user", "content": None}]}, "place: the content of a message must be text, not NoneT"),
        ({"messages": [{"role": "assistant", "content": None}]}, "place: the content of a message must be text, not"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "place has an empty answer"),
        ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, "place: 'tool_calls' of a message must be a list"),
        ({"messages": [{"from": "function_call", "value": "f(1)"}]}, "place: a message of 'function_call' must hold J"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "place: 'weight' of a message must be 0",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "place: 'train' of a message must be 0"),
        (
            {"messages": [{"role": "assistant", "content": "a", "train_detail": [1]}]},
            "place: 'train_detail' learns par",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "place learns no message, by its own mark",
        ),
        ({"messages": [], "tools": "nonsense"}, "place has no message of the assistant"),
        ({"instruction": "q", "output": "a", "tools": "nonsense"}, "place: 'tools' is not valid JSON: Expecting value"),
        (
            {"instruction": "q", "output": "a", "tools": "[" * 100_000},
            "place: 'tools' is not valid JSON: maximum recurs",
        ),
        ({"instruction": "q", "output": "a", "tools": ["f"]}, "place: 'tools' must be a list of JSON schemas"),
        ({"messages": ["hi"]}, "place: a message must have 'role' and 'content', or 'from' and 'value'"),
        ({"messages": [{"role": "user"}]}, "place: a message must have 'role' and 'content'"),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "a"}]}, "place: 'prompt' must be a list"),
    ],
)
def test_a_wrong_record_is_one_sentence(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(values)
    assert str(caught.value).startswith(expected)


def test_a_format_that_was_asked_for_is_checked() -> None:
    with pytest.raises(DataError, match="place has the columns 'text'; known are alpaca"):
        convert({"text": "t"}, name="alpaca")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
SPOKEN_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def test_a_message_keeps_all_its_keys() -> None:
    """Arguments as OpenAI writes them, a JSON text, are the object that templates expect."""
    said = [
        {"role": "user", "content": "q", "name": "Eve"},
        {"role": "assistant", "content": None, "tool_calls": [SPOKEN_CALL], "reasoning_content": "hm", "refusal": None},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "assistant", "content": "a"},
    ]
    record = convert({"messages": said, "tools": [{"name": "add"}]})
    assert isinstance(record, Conversation)
    assert [dict(turn.more) for turn in record.turns] == [
        {"name": "Eve"}, {"tool_calls": [CALL], "reasoning_content": "hm"}, {"tool_call_id": "1"}, {}
    ]  # fmt: skip
    assert [turn.content for turn in record.turns] == ["q", None, "5", "a"]
    assert record.tools == [{"name": "add"}]
    assert convert({"messages": said, "tools": '[{"name": "add"}]'}) == record
    for nothing in (None, "", "[]", []):
        assert convert({"messages": said, "tools": nothing}).tools is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "function-call", "value": '[{"name": "add", "arguments": "{\\"a\\": 2}"}]'},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}},
        {"role": "assistant", "tool_calls": [SPOKEN_CALL]},
    ],
)
def test_every_spelling_of_a_tool_call(message: dict[str, Any]) -> None:
    record = convert({"messages": [{"role": "user", "content": "q"}, message]})
    assert isinstance(record, Conversation)
    assert (record.turns[1].role, record.turns[1].text, record.turns[1].learned) == ("assistant", "", True)
    assert record.turns[1].more == {"tool_calls": [CALL]}


def test_roles_as_people_write_them() -> None:
    said = [("System ", "s"), ("User", "q"), ("chatgpt", "a"), ("function", "5"), ("Bot", "b"), ("developer", "d")]
    values = {"conversations": [{"from": who, "value": what} for who, what in said]}
    assert [turn[0] for turn in turns(values)] == ["system", "user", "assistant", "tool", "assistant", "developer"]
    assert noted(values, values) == {
        "roles": "'System ' read as system (2), 'User' read as user (2), 'chatgpt' read as assistant (2),"
        " 'function' read as tool (2), 'Bot' read as assistant (2)"
    }
    assert noted({"messages": TWO}) == {}


TWO = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_an_assistant_who_begins_is_noted() -> None:
    said = [{"role": "assistant", "content": "hello"}, *TWO]
    assert turns({"messages": said}) == [("assistant", "hello", True), *ASKED]
    assert noted({"messages": said}, {"messages": TWO}) == {"conversations": "begin with the assistant (1)"}


@pytest.mark.parametrize(
    ("marks", "learned"),
    [
        ([{}, {}], [False, True]),
        ([{}, {"weight": 1}], [False, True]),
        ([{"weight": 1}, {"train": None}], [False, True]),  # OpenAI's weight makes no answer of a question
        ([{"train": True}, {"weight": 0}], [True, False]),  # Axolotl's mark does
        ([{"training": True}, {"train": False}], [True, False]),
        ([{"loss": 1}, {"loss_weight": 0.0}], [True, False]),
        ([{"train": True}, {"train": True, "weight": 0}], [True, False]),
    ],
)
def test_what_a_message_says_of_the_loss(marks: list[dict[str, Any]], learned: list[bool]) -> None:
    said = [{**message, **mark} for message, mark in zip(TWO, marks, strict=True)]
    record = convert({"messages": said})
    assert isinstance(record, Conversation)
    assert [turn.learned for turn in record.turns] == learned
    assert not any(turn.more for turn in record.turns)


def test_a_system_message_alone_can_be_learned() -> None:
    assert turns({"messages": [{"role": "system", "content": "s", "train": True}]}) == [("system", "s", True)]


def test_an_answer_that_is_not_learned_may_be_empty() -> None:
    said = [TWO[0], {"role": "assistant", "content": "", "weight": 0}, *TWO]
    assert [turn[2] for turn in turns({"messages": said})] == [False, False, False, True]


def test_columns_that_are_not_read_are_noted() -> None:
    assert noted(
        {"messages": TWO, "id": 7, "source": None, "label": False}, {"messages": TWO, "id": 8, "tags": []}
    ) == {"not read": "the column 'id' (2), the column 'label' (1)"}
    assert noted({"prompt": "p", "completion": "c", "tools": "[]"}) == {"not read": "the column 'tools' (1)"}
    many = noted({"text": "t", **{f"c{index}": 1 for index in range(9)}})["not read"]
    assert many.count("the column") == 6
    assert many.endswith(", and 3 more")
