"""Measuring a span when it is loaded."""

from pathlib import Path

import pytest

from peer.span.loading import load_span
from peer.start.speed import measure
from protocol.model.checkpoint import open_checkpoint
from tests.tools.families import build_small, short


@pytest.mark.parametrize("context", [64, 16])
@pytest.mark.parametrize("family", ["mpt", "gptj"])
def test_a_context_shorter_than_what_is_measured(family: str, context: int, tmp_path: Path) -> None:
    folder = build_small(tmp_path / family, short(family, context))
    speed, token_bytes = measure(load_span(open_checkpoint(str(folder)), 0, 2))
    assert speed.forward > 0
    assert speed.decode > 0
    assert token_bytes == 2 * 2 * 32 * 4  # blocks, keys and values, float32
