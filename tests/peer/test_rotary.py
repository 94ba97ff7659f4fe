"""Rotary embeddings that grow with the longest sequence: of one call, not of whoever else used the span before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.adapters.peft_trees import share_linears
from peer.span.loading import load_span
from peer.span.span import Adapted, Inputs, Mode, Span
from protocol.model.checkpoint import open_checkpoint
from tests.tools.spans import END, START

LIMIT = 16
"""Positions that the model was made for."""


def dynamic_span(models: Callable[[str], Path], family: str, folder: Path) -> Span:
    path = shutil.copytree(models(family), folder / family)
    config = json.loads((path / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    types = sorted(set(config.get("layer_types") or ()))
    config |= {"max_position_embeddings": LIMIT, "rope_parameters": dict.fromkeys(types, rope) or rope}
    (path / "config.json").write_text(json.dumps(config))
    return load_span(open_checkpoint(str(path)), START, END)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_longer_sequence_leaves_nothing_behind(family: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    span = dynamic_span(models, family, tmp_path)
    adapted: Any = Adapted(share_linears(span.model), {})
    mode = Mode(span.blocks)
    hidden = torch.randn(1, 4 * LIMIT, span.hidden_size, generator=torch.Generator().manual_seed(0))
    for tree in (None, adapted):
        for length in (LIMIT + 8, LIMIT - 8):
            inputs = Inputs(hidden[:, :length])
            before = span.run(inputs, mode, adapted=tree)
            span.run(Inputs(hidden), mode, adapted=tree)
            assert torch.equal(span.run(inputs, mode, adapted=tree), before)
