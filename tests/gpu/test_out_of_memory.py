"""The short form of `benchmarks/out_of_memory.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.swarm.loop import LOOP


def test_requests_that_do_not_fit(pretended: Any, models: Callable[[str], Path]) -> None:
    """Are answered rightly or refused with a typed error, and the peer holds what it held before."""
    from benchmarks.out_of_memory import run  # which needs the pretended GPU

    report = LOOP.run(run(models("llama"), calls=80, seed=2, sizes=[(1, 60), (8, 120)]))
    assert not report.problems
    assert not report.leaked
    assert min(report.answered.total(), report.refused.total()) > 8
