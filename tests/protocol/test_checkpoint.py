"""What a checkpoint's files say of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from peer.span.loading import block_bytes, load_span
from protocol.model import checkpoint
from protocol.model.checkpoint import Hub, open_checkpoint
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


def test_weights_that_are_not_here(unnamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file on the hub only the header is fetched, with the user's token."""
    asked = []

    def find(model: str, name: str, revision: str | None = None, hub: Hub | None = None) -> Path | None:
        path = unnamed / name
        return path if path.exists() else None

    class Api:
        def __init__(self, token: str) -> None:
            asked.append(token)

        def parse_safetensors_file_metadata(self, model: str, file: str, revision: str | None) -> Any:
            asked.append((model, file, revision))
            return SimpleNamespace(tensors={"a": SimpleNamespace(dtype="I64"), "b": SimpleNamespace(dtype="BF16")})

    monkeypatch.setattr(checkpoint, "find_file", find)
    monkeypatch.setattr(checkpoint, "HfApi", Api)
    opened = open_checkpoint("me/mine", "v1", Hub(token="secret"))
    assert opened.dtype == torch.bfloat16
    assert asked == ["secret", ("me/mine", min(opened.weight_map.values()), "v1")]
