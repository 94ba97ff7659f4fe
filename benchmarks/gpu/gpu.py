"""The device that is measured: time and memory. A CPU may stand in for it, to try the programs out."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.core import wait_for
from protocol.machine.devices import choose_device

_PERIOD = 0.01
"""Seconds between two looks at the memory."""


@dataclass
class Peak:
    """The most memory that was in use."""

    size: int = 0
    """Bytes, beyond what was in use at the beginning."""


class Gpu:
    """A torch device by its name, such as `cuda:0`. Raises `BadUsage` where it does not work."""

    def __init__(self, name: str):
        self.device = choose_device(name)
        self.name = str(self.device)
        self.is_gpu = self.device.type == "cuda"
        """AMD's, too."""
        self.is_real = self.is_gpu and torch.cuda.is_available()
        """Whether there are streams, kernels and pinned memory: not where tests pretend."""

    def wait(self) -> None:
        """Until what was handed to it is done."""
        wait_for(self.device)

    def clock(self) -> float:
        """Seconds, when what was handed to it is done."""
        self.wait()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object], rounds: int = 5, warm: int = 2) -> float:
        """The median of some runs of `work`, after some that do not count."""
        times = []
        for _ in range(warm + rounds):
            begin = self.clock()
            work()
            times.append(self.clock() - begin)
        return statistics.median(times[warm:])

    def allocated(self) -> int:
        """Bytes of this process's tensors there; 0 on a CPU."""
        return int(torch.cuda.memory_allocated(self.device)) if self.is_gpu else 0

    @contextmanager
    def peak_here(self) -> Iterator[Peak]:
        """Of this process's tensors, while the block runs; 0 on a CPU."""
        peak, before = Peak(), self.allocated()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield peak
        if self.is_gpu:
            peak.size = int(torch.cuda.max_memory_allocated(self.device)) - before

    @contextmanager
    def peak_of_all(self) -> Iterator[Peak]:
        """Of all processes on the card, whatever they hold it for, while the block runs; 0 on a CPU."""
        peak, ended = Peak(), threading.Event()
        before = self._used()

        def watch() -> None:
            while not ended.wait(_PERIOD):
                peak.size = max(peak.size, self._used() - before)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield peak
        finally:
            ended.set()
            thread.join()

    def _used(self) -> int:
        if not self.is_gpu:
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)
