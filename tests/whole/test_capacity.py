"""docs/capacity.md follows from the models' real shapes."""

from pathlib import Path

import pytest

from benchmarks.capacity import BYTES_PER_WEIGHT, GIB, Card, blocks_per_gpu, decode_seconds, graph_growth, measure, page


@pytest.mark.parametrize(("name", "weights"), [("BLOOM-176B", 176.25e9), ("Llama-3.1-405B", 405.85e9)])
def test_the_shapes_are_the_real_ones(name: str, weights: float) -> None:
    sizes = measure(name)
    total = sizes.blocks * sizes.block_weights + sizes.outside_weights
    assert total == pytest.approx(weights, rel=1e-3)


def test_what_fits_a_gpu() -> None:
    sizes = measure("BLOOM-176B")
    count = blocks_per_gpu(sizes, 24, "nf4", tokens=2048)
    per_block = sizes.block_weights * BYTES_PER_WEIGHT["nf4"] + 2048 * 2 * 14336 * 2
    assert count * per_block <= 0.8 * 24 * GIB < (count + 1) * per_block


def test_what_a_block_keeps() -> None:
    """BLOOM's as it was measured on the meta device by other means: MB of 1 x 1,024 and 1 x 2,048 tokens."""
    growth = graph_growth("BLOOM-176B")
    assert growth.at(1, 1024) == pytest.approx(1.03e9, rel=0.01)
    assert growth.at(1, 2048) == pytest.approx(3.5e9, rel=0.02)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("name", "memory"), [("BLOOM-176B", 24), ("BLOOM-176B", 80), *(("Llama-3.3-70B", n) for n in (8, 12, 24, 80))]
)
def test_a_span_that_fits_with_its_cache_can_train_a_row(name: str, memory: int, form: str) -> None:
    card = Card.as_chosen(name, form, memory)
    assert card.blocks > 0
    assert card.budget.cache_tokens >= 2048
    assert card.longest_row >= 2048
    assert card.in_flight > 1024


def test_links_dominate_where_they_are_slow() -> None:
    sizes = measure("BLOOM-176B")
    fast = decode_seconds(sizes, 3, "int8", 2e12, 125e6, 0.0)
    handed_over = fast + (3 + 1) * 0.1 / 2
    assert decode_seconds(sizes, 3, "int8", 2e12, 125e6, 0.1) == pytest.approx(handed_over)


def test_the_page_is_the_generated_one() -> None:
    committed = Path(__file__).parents[2] / "docs" / "capacity.md"
    assert committed.read_text() == page(), "run: python -m benchmarks.capacity > docs/capacity.md"
