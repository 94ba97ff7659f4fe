"""How long work takes."""

import time
from collections.abc import Callable


def fastest(work: Callable[[], object], runs: int = 8, budget: float = 0.2) -> float:
    """Seconds of the fastest of some runs of `work`: the others were disturbed.

    None is begun more than `budget` seconds after the first.
    """
    best, begin = float("inf"), time.perf_counter()
    for _ in range(runs):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > budget:
            break
    return best
