"""The tests of `tests/gpu` on the pretended GPU, which must be there before PyTorch: so in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.device_library import why_not

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_what_needs_a_gpu(tmp_path: Path) -> None:
    options = ("-q", "-n0", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "tests"))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "tests.tools.pretended_gpu", "tests/gpu"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert " skipped" not in ran.stdout, ran.stdout
