"""Fuzzing in short: 20,000 inputs that are the same every time. In long: `python -m benchmarks.fuzz`."""

import random

import pytest

from tests.tools.fuzzing.choices import Choices
from tests.tools.fuzzing.targets import bounded_memory, build_target, resident

INPUTS = {
    "handlers": 4000, "frames": 5000, "introductions": 2000, "records": 4000, "seal": 2000, "membership": 3000
}  # fmt: skip
MAX_GROWTH = 64
"""MiB."""


def test_there_are_so_many_inputs() -> None:
    assert sum(INPUTS.values()) == 20_000


@pytest.mark.parametrize("name", INPUTS)
def test_nothing_that_comes_does_harm(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    numbers = random.Random(17)
    target = build_target(name, tmp_path_factory.getbasetemp() / "models")
    try:
        with bounded_memory():
            while target.inputs < INPUTS[name] // 4:  # modules and adapters' trees are made
                target.play(numbers.randbytes(numbers.choice((20, 60, 300))))
            before = resident()
            while target.inputs < INPUTS[name]:
                target.play(numbers.randbytes(numbers.choice((20, 60, 300))))
            target.check()
        assert resident() - before < MAX_GROWTH
    finally:
        target.close()


def test_used_up_choices_go_on() -> None:
    choices = Choices(b"\x05")
    assert (choices.below(4), choices.pick("ab"), choices.one_in(3), choices.raw(2), choices.is_over) == (
        1,
        "a",
        False,
        b"",
        True,
    )
