"""How long work takes."""

import time
from collections.abc import Callable

_RUNS, _BUDGET = 8, 0.2
"""Runs of a measurement at most, and the seconds after which no further run is begun."""


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of up to 8 runs of `work`: other processes only ever slow a run down."""
    best, begin = float("inf"), time.perf_counter()
    for _ in range(_RUNS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > _BUDGET:
            break
    return best
