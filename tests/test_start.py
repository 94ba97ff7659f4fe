"""What starts quickly: nothing is imported before it is needed."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.imports import without_collection

HEAVY = {"torch", "transformers", "hivemind", "peft", "bitsandbytes", "scipy", "sympy"}


@pytest.mark.parametrize(
    "code", ["from client import AutoDistributedModelForCausalLM, SwarmConfig", "import peer.cli, client.cli"]
)
def test_names_and_commands_are_there_without_torch(code: str) -> None:
    look = f"{code}; import sys; print(*(name for name in sys.modules if '.' not in name))"
    found = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert "client" in found.stdout.split()
    assert HEAVY & set(found.stdout.split()) == set()


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
