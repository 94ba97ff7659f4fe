"""What a manifest says of a folder, when it is made anew, and which are refused."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from protocol.errors import BadRequest, PeerFailed, UnsupportedModel
from protocol.model.checkpoint import open_checkpoint, read_layout
from protocol.weights import making
from protocol.weights.manifest import MAX_PIECE, Manifest
from tests.tools.weights import hold_folder


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models("llama"), tmp_path / "llama"))


def test_pieces_are_the_files(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("not a part of the model")
    (folder / "adapter_config.json").write_text("{}")
    held = hold_folder(folder, tmp_path / "kept")
    manifest = held.manifest
    names = {path.name for path in folder.iterdir()} - {"README.md", "adapter_config.json"}
    assert {file.name for file in manifest.files} == names
    for file in manifest.files:
        data = (folder / file.name).read_bytes()
        assert file.size == len(data)
        assert b"".join(held.read(number) for number in manifest.numbers[file.name]) == data
    assert manifest.hash == hashlib.sha256(manifest.data).hexdigest()
    assert Manifest.from_bytes(manifest.data, manifest.hash) == manifest


def test_no_piece_has_parts_of_two_blocks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who needs a block fetches nothing of its neighbours; nor is any too long."""
    monkeypatch.setattr(making, "MAX_PIECE", 3000)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="1GB")
    for shard in folder.glob("*-of-*"):
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    manifest = hold_folder(folder, tmp_path / "kept").manifest
    layout = read_layout(folder / "model.safetensors")
    numbers = manifest.numbers["model.safetensors"]
    assert {0, layout.data_start} <= {manifest.pieces[number].start for number in numbers}
    owners: dict[int, set[str]] = {}
    for tensor, (start, end) in layout.tensors.items():
        block = ".".join(tensor.split(".")[:3]) if ".layers." in tensor else "outside"
        for number in manifest.covering("model.safetensors", start, end):
            owners.setdefault(number, set()).add(block)
    assert {len(blocks) for blocks in owners.values()} == {1}
    assert max(piece.size for piece in manifest.pieces) == 3000
    assert len(numbers) > 20


def test_a_manifest_is_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = making._make
    monkeypatch.setattr(making, "_make", lambda *given: (made.append(1), make(*given))[1])
    first = hold_folder(folder, tmp_path / "kept")
    assert hold_folder(folder, tmp_path / "kept").manifest == first.manifest
    assert len(made) == 1
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(1, 1))
    assert hold_folder(folder, tmp_path / "kept").manifest.hash != first.manifest.hash
    assert len(made) == 2
    with pytest.raises(PeerFailed, match="changed"):  # what is given to others is what was promised, or nothing
        first.read(first.manifest.numbers[shard.name][-1])


def test_reading_ends_with_the_process(folder: Path, tmp_path: Path) -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(UnsupportedModel, match="not read to its end"):
        making.hold(open_checkpoint(str(folder)), tmp_path / "kept", stopped)


def test_a_model_in_part_is_not_given(folder: Path, tmp_path: Path) -> None:
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    assert making.hold(open_checkpoint(str(folder)), tmp_path) is None


GOOD = {"name": "config.json", "pieces": [[2, "a" * 64]], "digest": ""}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "at least 1"),
        ([GOOD | {"name": "../config.json"}], "pattern"),
        ([GOOD | {"name": "a/config.json"}], "pattern"),
        ([GOOD, GOOD | {"name": "Config.json"}], "named twice"),
        ([GOOD, GOOD | {"name": "modeling.py"}], "no file of a model"),
        ([GOOD, GOOD | {"name": "model.bin"}], "no file of a model"),
        ([GOOD | {"name": "x.json"}], "no config.json"),
        ([GOOD | {"pieces": []}], "empty"),
        ([GOOD | {"pieces": [[0, "a" * 64]]}], "greater than 0"),
        ([GOOD | {"pieces": [[MAX_PIECE + 1, "a" * 64]]}], "less than or equal"),
        ([GOOD | {"pieces": [[2, "A" * 64]]}], "pattern"),
        ([GOOD | {"more": 1}], "Extra"),
    ],
)
def test_what_no_manifest_says(files: list[object], problem: str) -> None:
    data = json.dumps({"files": files}, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(BadRequest, match=problem):
        Manifest.from_bytes(data, hashlib.sha256(data).hexdigest())


def test_another_manifest_than_the_one_that_was_asked_for() -> None:
    data = json.dumps({"files": [GOOD]}, sort_keys=True, separators=(",", ":")).encode()
    manifest = Manifest.from_bytes(data, hashlib.sha256(data).hexdigest())
    assert manifest.data == data
    with pytest.raises(BadRequest, match="not the manifest"):
        Manifest.from_bytes(data, "0" * 64)
    loose = json.dumps({"files": [GOOD]}).encode()
    with pytest.raises(BadRequest, match="not written as one"):
        Manifest.from_bytes(loose, hashlib.sha256(loose).hexdigest())
