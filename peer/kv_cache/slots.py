"""Which slots of a KV arena belong to whom: runs of consecutive slots.

A run gets the smallest hole that is large enough, the lowest address among equals. A hole is all that lies between two
runs. What is free can always be had: when no hole is large enough, runs are slid together, where that moves the fewest
slots.
"""

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(eq=False)
class Run:
    """Consecutive slots of one owner. A slot holds the keys and values of one token of one row, of every block."""

    start: int = 0
    size: int = 0

    @property
    def end(self) -> int:
        """The first slot behind it."""
        return self.start + self.size


class Move(NamedTuple):
    """What lies in `size` slots from `source` on is to be copied to `target`; the two may overlap."""

    source: int
    target: int
    size: int


class Slots:
    """`total` slots and the runs in them. Not thread-safe."""

    def __init__(self, total: int):
        self.total = total
        self.free = total
        """Slots in no run."""
        self._runs: list[Run] = []  # by address

    def resize(self, run: Run, size: int) -> tuple[list[Move], int]:
        """Make `run` `size` slots long, at most `free` more than it is; it may lie elsewhere then.

        Returns the moves of runs that make room, in an order in which none overwrites what another has yet to move, and
        where the contents of `run` begin after them: its owner copies them to the new start.
        """
        if size - run.size > self.free:
            raise ValueError(f"{size - run.size} more slots are asked for, {self.free} are free")
        if size == run.size:
            return [], run.start
        before, moves, source = run.size, list[Move](), run.start
        start = self._find(run, size)
        if start is None:
            moves, start = self._make_room(run, size)
            source = run.start
        self._take_out(run)
        run.start, run.size = start, size
        if size:
            insort(self._runs, run, key=lambda other: other.start)
        self.free -= size - before
        return moves, source

    def release(self, run: Run) -> None:
        """`run` has no slots any more."""
        self._take_out(run)
        self.free += run.size
        run.size = 0

    def _take_out(self, run: Run) -> None:
        if run.size:
            self._runs.remove(run)

    def _find(self, run: Run, size: int) -> int | None:
        """Where `size` slots can be had at once: in place, else in the smallest hole that is large enough."""
        holes = list(_holes([other for other in self._runs if other is not run], self.total))
        if run.size and any(start <= run.start and run.start + size <= end for start, end in holes):
            return run.start
        fitting = [(end - start, start) for start, end in holes if end - start >= size]
        return min(fitting)[1] if fitting else None

    def _make_room(self, run: Run, size: int) -> tuple[list[Move], int]:
        """Slide the runs of a window together. If `run` is among them, the room is in front of it and behind it."""
        start, end, inside = self._cheapest_window(run, size)
        moves = []
        pivot = inside.index(run) + 1 if run.size and run in inside else len(inside)
        for other in inside[:pivot]:
            moves += _slide(other, start)
            start += other.size
        for other in reversed(inside[pivot:]):
            end -= other.size
            moves += _slide(other, end)
        return moves, run.start if pivot and inside[pivot - 1] is run else start

    def _cheapest_window(self, run: Run, size: int) -> tuple[int, int, list[Run]]:
        """Bounds and runs of the window with the fewest slots to move that has room for `size` slots."""
        holes = list(_holes(self._runs, self.total, empty_ones=True))
        windows = self._windows_with_room(holes, run, size)
        first, last = min(windows, key=lambda window: sum(other.size for other in self._runs[window[0] : window[1]]))
        return holes[first][0], holes[last][1], self._runs[first:last]

    def _windows_with_room(self, holes: Sequence[tuple[int, int]], run: Run, size: int) -> Iterator[tuple[int, int]]:
        """From each hole to the nearest one with which there is room, counting what `run` has now: pairs of numbers."""
        for first in range(len(holes)):
            room = 0
            for last in range(first, len(holes)):
                room += holes[last][1] - holes[last][0]
                if room >= size:
                    yield first, last
                    break
                if last < len(self._runs) and self._runs[last] is run:
                    room += run.size


def _holes(runs: Sequence[Run], total: int, empty_ones: bool = False) -> Iterator[tuple[int, int]]:
    """Bounds of what lies before, between and behind `runs`."""
    at = 0
    for run in runs:
        if empty_ones or run.start > at:
            yield at, run.start
        at = run.end
    if empty_ones or total > at:
        yield at, total


def _slide(run: Run, start: int) -> list[Move]:
    move = Move(run.start, start, run.size)
    run.start = start
    return [move] if move.source != move.target else []
