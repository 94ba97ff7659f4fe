"""What starts quickly: nothing is imported before it is needed."""

import gc
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from protocol.machine.imports import without_collection

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "hivemind", "peft", "bitsandbytes", "scipy", "sympy"}


@pytest.mark.parametrize(
    "code",
    [
        "from client import AutoDistributedModelForCausalLM, SwarmConfig",
        "import peer.commands.app, client.commands.app",
    ],
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
