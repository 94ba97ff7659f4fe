"""Measuring a span when it is loaded."""

from pathlib import Path

import pytest
from transformers import GPTJConfig, MptConfig, PretrainedConfig

from peer.span.loading import load_span
from peer.start.speed import measure
from protocol.model.checkpoint import open_checkpoint
from tests.tools.families import build_small

TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def short(family: str, context: int) -> PretrainedConfig:
    """Of models whose blocks have a table of so many positions."""
    if family == "mpt":
        return MptConfig(**TOKENS, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=context)
    return GPTJConfig(**TOKENS, n_embd=32, n_head=4, n_layer=2, rotary_dim=4, n_positions=context)


@pytest.mark.parametrize("context", [64, 16])
@pytest.mark.parametrize("family", ["mpt", "gptj"])
def test_a_context_shorter_than_what_is_measured(family: str, context: int, tmp_path: Path) -> None:
    folder = build_small(tmp_path / family, short(family, context))
    speed, token_bytes = measure(load_span(open_checkpoint(str(folder)), 0, 2))
    assert speed.forward > 0
    assert speed.decode > 0
    assert token_bytes == 2 * 2 * 32 * 4  # blocks, keys and values, float32
