"""The targets by name, and the bounds that hold for all of them."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil

from tests.tools.families import build_family
from tests.tools.fuzzing.handlers import Handlers
from tests.tools.fuzzing.membership import Memberships
from tests.tools.fuzzing.parsers import Frames, Introductions, Records, Seals

NAMES = ("handlers", "frames", "introductions", "records", "seal", "membership")
_MIB = 2**20


class Target(Protocol):
    """What is fuzzed."""

    inputs: int
    """Tried so far."""

    def play(self, data: bytes) -> None:
        """Try what `data` decides on: one input, or a few. Raises for anything that should not have happened."""

    def check(self) -> None:
        """Raises when an earlier input has left damage."""

    def close(self) -> None:
        """Free what is in use."""


def build_target(name: str, folder: Path) -> Target:
    """One of `NAMES`; `folder` is for a small model."""
    if name == "handlers":
        return Handlers(build_family("llama", folder))
    kinds: dict[str, Callable[[], Target]] = {
        "frames": Frames, "introductions": Introductions, "records": Records, "seal": Seals, "membership": Memberships,
    }  # fmt: skip
    return kinds[name]()


@contextmanager
def bounded_memory(more: int = 1024) -> Iterator[None]:
    """Within the block this process gets `more` MiB of address space at most: what is only claimed cannot be had."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more * _MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def resident() -> int:
    """MiB of memory that this process has."""
    return int(psutil.Process().memory_info().rss) // _MIB
