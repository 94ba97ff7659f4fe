"""docs/parity.md says what is tested."""

from pathlib import Path

from tests.tools.parity_table import page


def test_the_page_is_the_one_generated() -> None:
    written = Path(__file__).parents[2] / "docs" / "parity.md"
    assert written.read_text() == page(), "run python -m tests.tools.parity_table > docs/parity.md"
