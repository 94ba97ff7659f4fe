"""docs/capacity.md follows from the models' real shapes."""

from pathlib import Path

import pytest

from benchmarks.capacity import BYTES_PER_WEIGHT, GIB, MODELS, blocks_per_gpu, decode_seconds, measure, page


@pytest.mark.parametrize(("name", "weights"), [("BLOOM-176B", 176.25e9), ("Llama-3.1-405B", 405.85e9)])
def test_the_shapes_are_the_real_ones(name: str, weights: float) -> None:
    sizes = measure(MODELS[name])
    total = sizes.blocks * sizes.block_weights + sizes.outside_weights
    assert total == pytest.approx(weights, rel=1e-3)


def test_what_fits_a_gpu() -> None:
    sizes = measure(MODELS["BLOOM-176B"])
    count = blocks_per_gpu(sizes, 24, "nf4", tokens=2048)
    per_block = sizes.block_weights * BYTES_PER_WEIGHT["nf4"] + 2048 * 2 * 14336 * 2
    assert count * per_block <= 0.8 * 24 * GIB < (count + 1) * per_block


def test_links_dominate_where_they_are_slow() -> None:
    sizes = measure(MODELS["BLOOM-176B"])
    fast = decode_seconds(sizes, 3, "int8", 2e12, 125e6, 0.0)
    handed_over = fast + (3 + 1) * 0.1 / 2
    assert decode_seconds(sizes, 3, "int8", 2e12, 125e6, 0.1) == pytest.approx(handed_over)


def test_the_page_is_the_generated_one() -> None:
    committed = Path(__file__).parents[2] / "docs" / "capacity.md"
    assert committed.read_text() == page(), "run: python -m benchmarks.capacity > docs/capacity.md"
