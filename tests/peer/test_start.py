"""What starts quickly: nothing is imported before it is needed."""

import ctypes
import gc
import json
import mmap
import os
import struct
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from protocol.machine.imports import without_collection
from protocol.model.read_ahead import _read_ahead, begin_to_read

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "hivemind", "peft", "bitsandbytes", "scipy", "sympy"}


@pytest.mark.parametrize(
    "code", ["from client import AutoDistributedModelForCausalLM, SwarmConfig", "import peer.cli, client.cli"]
)
def test_names_and_commands_are_there_without_torch(code: str) -> None:
    look = f"{code}; import sys; print(*(name for name in sys.modules if '.' not in name))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "client" in found.stdout.split()
    assert HEAVY & set(found.stdout.split()) == set()


class _Interrupted:
    """Ctrl-C while the commands are being imported."""

    def find_spec(self, name: str, *_place: object) -> None:
        if name == "peer.commands.app":
            raise KeyboardInterrupt


def test_a_command_that_is_interrupted_during_its_imports_just_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["peer"]
    monkeypatch.delitem(sys.modules, "peer.commands.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        EntryPoint("peer", script, "console_scripts").load()()
    assert stopped.value.code == 130


@pytest.mark.parametrize("package", ["client", "peer"])
@pytest.mark.parametrize("chosen", [None, "70000"])
def test_idle_threads_spin_briefly_unless_the_user_wants_otherwise(package: str, chosen: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"GOMP_SPINCOUNT": chosen} if chosen else {})
    code = [sys.executable, "-c", f"import {package}, torch"]
    found = subprocess.run(code, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert f"GOMP_SPINCOUNT = '{chosen or 6000}'" in found.stderr


def _import_nothing() -> None:
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
        raise ImportError


def test_there_is_no_collection_during_imports() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError):
        _import_nothing()
    assert gc.isenabled()


def _is_resident(file: BinaryIO, offset: int) -> bool:
    """Whether a byte of a file is in the page cache; reading it to find out would bring it there."""
    found = (ctypes.c_ubyte * 1)()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        page = ctypes.addressof(first) + offset // mmap.PAGESIZE * mmap.PAGESIZE
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), found) == 0
        del first
    return bool(found[0] & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_the_disk_reads_the_blocks_of_a_peer_and_no_others(tmp_path: Path) -> None:
    where: dict[int, tuple[BinaryIO, int]] = {}
    index = {}
    with ExitStack() as files:
        for name, numbers in (("a.safetensors", range(3)), ("b.safetensors", range(3, 6))):
            tensors = {f"model.layers.{i}.w.0.weight": torch.full((2**20,), i + 0.5) for i in numbers}
            save_file(tensors | {"model.norm.weight": torch.ones(7)}, tmp_path / name)
            index |= dict.fromkeys(tensors, name)
            file = files.enter_context((tmp_path / name).open("rb"))
            content = file.read()
            middle = 2**21  # of its 4 MiB
            where |= {i: (file, content.index(struct.pack("<3f", *[i + 0.5] * 3)) + middle) for i in numbers}
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        if any(_is_resident(*place) for place in where.values()):
            pytest.skip("this file system keeps everything in memory")
        begin_to_read(str(tmp_path), None, range(2, 4))
        deadline = time.monotonic() + 10
        while not all(_is_resident(*where[i]) for i in (2, 3)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [i for i, place in where.items() if _is_resident(*place)] == [2, 3]


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b'{"a'])
def test_what_is_no_checkpoint_is_left_to_those_who_load_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    _read_ahead(str(tmp_path), None, range(2))
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    _read_ahead(str(tmp_path), None, range(2))
