"""What a checkpoint's files say of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peer.span.loading import block_bytes, load_span
from protocol.model.checkpoint import open_checkpoint
from tests.tools.damage import CONFIG, edit


@pytest.fixture(scope="module", params=["one file", "shards"])
def unnamed(request: pytest.FixtureRequest, models: Callable[[str], Path], tmp_path_factory: Any) -> Path:
    """A model in float16 whose configuration names no dtype, as that of bloom-560m."""
    folder = Path(tmp_path_factory.mktemp("unnamed"), "llama")
    size = "60KB" if request.param == "shards" else "1GB"
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size=size)
    edit(CONFIG, dtype=None, torch_dtype=None)(folder)
    return folder


def test_a_dtype_that_only_the_weights_tell(unnamed: Path) -> None:
    """As Transformers: of what a peer loads, and of what it takes that to be."""
    local = transformers.AutoModelForCausalLM.from_pretrained(unnamed)
    opened = open_checkpoint(str(unnamed))
    assert opened.dtype == local.dtype == torch.float16
    span = load_span(opened, 1, 2)
    assert span.dtype == torch.float16
    assert {parameter.dtype for parameter in span.model.parameters()} == {torch.float16}
    assert 2 * block_bytes(opened, None, "none") == block_bytes(opened, torch.float32, "none")


def test_the_configuration_comes_first(unnamed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unnamed, tmp_path / "llama")
    edit(CONFIG, dtype="float32")(folder)
    local = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert open_checkpoint(str(folder)).dtype == local.dtype == torch.float32
