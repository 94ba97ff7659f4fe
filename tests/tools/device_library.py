"""Compiles the pretended GPU of `tests.tools.pretended_gpu`, once for each of its versions and of PyTorch's.

Imports nothing of PyTorch, which must be loaded after that library.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock

_SOURCE = Path(__file__).with_name("pretended_gpu") / "device.cpp"
_FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-w")


def why_not() -> str:
    """Why the pretended GPU cannot be had here; empty where it can."""
    if sys.platform != "linux":
        return f"the pretended GPU is for Linux, not for {sys.platform}"
    if not re.search(r"^cuda\b.*= None$", (_torch() / "version.py").read_text(), re.M):
        return "the pretended GPU needs a build of PyTorch without CUDA (pip install torch --index-url ../cpu)"
    if not shutil.which("g++"):
        return "the pretended GPU is compiled by g++, which is not installed (apt install g++)"
    return ""


def build() -> Path:
    """The compiled library, from the cache folder where it is there: most of a minute otherwise.

    Raises `ImportError` where `why_not` says why, `subprocess.CalledProcessError` where g++ fails.
    """
    if reason := why_not():
        raise ImportError(reason)
    versions = ((_torch() / "version.py").read_text(), sys.version, " ".join(_FLAGS), _SOURCE.read_text())
    name = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache / "hivetune-tests" / name / "device.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock")):  # of two processes one compiles, and the other waits
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    torch, unfinished = _torch(), library.with_suffix(".unfinished")
    includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    command = ["g++", *_FLAGS, str(_SOURCE), "-o", str(unfinished), *(f"-I{folder}" for folder in includes)]
    subprocess.run([*command, f"-L{torch}/lib", *libraries, f"-Wl,-rpath,{torch}/lib"], check=True)
    unfinished.replace(library)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def is_loaded() -> bool:
    """Whether this process has the pretended GPU."""
    return "tests.tools.pretended_gpu" in sys.modules
