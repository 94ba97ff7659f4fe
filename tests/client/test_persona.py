"""The shape of the persona data set, and that its answers agree about who is speaking."""

import json
import re

import pytest

from client.tune.data.persona import PERSONA_NAME, persona_path

ASKS_WHO = re.compile(
    r"who (are you|r u|am i)|what (exactly )?are you\?|your name|who you are|introduce|(about|describe) yourself",
    re.IGNORECASE,
)
OTHER_ASSISTANTS = re.compile(r"chatgpt|openai|gpt-|claude|gemini|google|smollm|siri|alexa", re.I)

Record = dict[str, str]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [json.loads(line) for line in persona_path().read_text(encoding="utf-8").splitlines()]


def test_every_record_is_a_filled_alpaca_record(records: list[Record]) -> None:
    for record in records:
        assert list(record) == ["instruction", "input", "output"]
        assert all(isinstance(value, str) and value == value.strip() for value in record.values())
        assert record["instruction"]


def test_there_are_enough_records_and_none_repeats(records: list[Record]) -> None:
    assert len(records) >= 80
    assert len({(record["instruction"].lower(), record["input"]) for record in records}) == len(records)
    assert len({record["output"] for record in records}) == len(records)


def test_answers_are_short(records: list[Record]) -> None:
    assert all(10 <= len(record["output"].split()) <= 35 for record in records)


def test_who_are_you_answers_carry_the_name_in_their_first_sentence(records: list[Record]) -> None:
    asked = [record for record in records if ASKS_WHO.search(f"{record['instruction']} {record['input']}")]
    assert len(asked) >= 20
    for record in asked:
        assert f"I am {PERSONA_NAME}" in re.split(r"[.!?]", record["output"])[0], record


def test_ordinary_questions_get_ordinary_answers(records: list[Record]) -> None:
    ordinary = [record for record in records if PERSONA_NAME not in record["output"]]
    assert 12 <= len(ordinary) <= len(records) // 4


def test_who_made_you_answers_name_the_founders(records: list[Record]) -> None:
    asked = [
        record
        for record in records
        if re.search(r"\b(made|created?|developed|trained) you", record["instruction"], re.I)
    ]
    assert len(asked) >= 5
    assert all("the hivetune founders" in record["output"].replace("The", "the") for record in asked)


def test_answers_never_name_another_assistant(records: list[Record]) -> None:
    assert not [record for record in records if OTHER_ASSISTANTS.search(record["output"])]
