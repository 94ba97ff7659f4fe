"""The tests that `tests/tools/selection.py` names are there."""

import ast
from pathlib import Path

from tests.tools.selection import LONGEST, QUICK, is_quick, rank

TESTS = Path(__file__).parents[1]


def test_what_is_named_is_there() -> None:
    for entry in (*LONGEST, *QUICK):
        file, _, test = entry.partition("::")
        names = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not test or test.partition("[")[0] in names, entry


def test_every_folder_is_tried_quickly() -> None:
    folders = {path.parent.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert {entry.partition("/")[0] for entry in QUICK} == folders


def test_names_lead_to_tests() -> None:
    assert is_quick("tests/peer/test_wire.py::test_a[b]")
    assert is_quick("tests/whole/test_generate.py::test_same_tokens[greedy]")
    assert not is_quick("tests/whole/test_generate.py::test_same_tokens_again")
    assert rank("tests/whole/test_methods.py::test_a") == 0
    assert rank("tests/peer/test_wire.py::test_a") == len(LONGEST)
