"""Which work runs next on the device: one compute thread, its time shared fairly between clients.

Start-time fair queuing (Goyal et al. 1996) over measured seconds: the client that has had the least goes first. One
that comes back from a pause starts level with the others: it has saved up nothing. The same rule shares a client's own
time between its generations and its training.

Work of one group is done in one go with what else of that group is waiting, whoever sent it: each client is charged
its part of the time. That comes about while the work before is running; see `peer.compute.batching_window` for what comes just after.
"""

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

from peer.compute.batching_window import Gathering

T = TypeVar("T")
Item = TypeVar("Item")

_HEAD_START = 0.1
"""Seconds of computing by which a step of a generation may run ahead of its client's share."""
_PAUSE, _QUEUE = (0.15, 0.02), (0.8, 0.1)
"""How long a call waits for more work, as a share of a call's time and in seconds at most: one after a pause, and
one whose work has queued. Of the latter a whole call's time would be too much: so late comes what is on its way through
another peer as it should be."""


class Priority(IntEnum):
    """Lower has a head start."""

    STEP = 0
    """A step of a generation: somebody waits for every single one."""
    CALL = 1
    """A forward or a backward of training, or an adapter being put."""


@dataclass(frozen=True, eq=False)
class _Work:
    number: int
    priority: Priority
    run: Callable[[list[Any]], Sequence[Any]]
    item: Any
    group: Hashable | None
    size: int
    future: asyncio.Future[Any]


@dataclass
class _Flow:
    """One client's work of one priority, oldest first, and the seconds that it is taken to have had."""

    head_start: float
    used: float = 0.0
    work: deque[_Work] = field(default_factory=deque)

    @property
    def turn(self) -> tuple[float, int]:
        """The least goes first."""
        return self.used - self.head_start, self.work[0].number


@dataclass
class _Client:
    """One client's flows, and the seconds of computing that it is taken to have had."""

    used: float
    level: float = 0.0
    """The turn of the flow served last: where a flow starts that was empty."""
    flows: dict[Priority, _Flow] = field(
        default_factory=lambda: {Priority.STEP: _Flow(_HEAD_START), Priority.CALL: _Flow(0.0)}
    )

    @property
    def has_work(self) -> bool:
        return any(flow.work for flow in self.flows.values())

    def next_flow(self) -> _Flow:
        """The one whose turn it is."""
        return min((flow for flow in self.flows.values() if flow.work), key=lambda flow: flow.turn)

    @property
    def turn(self) -> tuple[float, int]:
        """The least goes first."""
        flow = self.next_flow()
        return self.used - flow.head_start, flow.work[0].number

    def push(self, priority: Priority, work: _Work) -> None:
        flow = self.flows[priority]
        if not flow.work:
            flow.used = max(flow.used, self.level)
        flow.work.append(work)


@dataclass(frozen=True)
class _Rider:
    """Work whose turn it is, or that is done along with it, and who pays for it."""

    work: _Work
    client: _Client
    flow: _Flow


class Scheduler:
    """Runs submitted work on a thread of its own, and hands results to the event loop.

    `joined_size`: how much work, in sizes as `submit_joint` is told, may be done along with that whose turn it is.
    """

    def __init__(self, joined_size: int = 512) -> None:
        self.joined_size = joined_size
        self._waiting: dict[str, _Client] = {}
        self._level = 0.0
        """The turn of the work begun last: where newcomers start."""
        self._numbers = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        self._gatherings = {(priority, False): Gathering(*_PAUSE) for priority in Priority}
        self._gatherings[Priority.STEP, True] = Gathering(*_QUEUE)
        """By priority, and whether work has queued: training calls gain less by company than they would lose."""
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, priority: Priority, function: Callable[[], T], client: str = "") -> "asyncio.Future[T]":
        """Queue `function` for a client; the future belongs to the running loop. Cancelled work is not begun."""
        return self.submit_joint(priority, lambda _: [function()], None, client)

    def submit_joint(
        self,
        priority: Priority,
        run: Callable[[list[Item]], Sequence[T | BaseException]],
        item: Item,
        client: str = "",
        group: Hashable | None = None,
        size: int = 1,
    ) -> "asyncio.Future[T]":
        """Queue `item` for `run`, which gets others of the same group along with it and returns what became of each.

        `size`: the item's part of what such a call costs. Without a group `run` gets this item only.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._ready:
            owner = self._waiting.setdefault(client, _Client(self._level))
            if not owner.has_work:
                owner.used = max(owner.used, self._level)
            owner.push(priority, _Work(next(self._numbers), priority, run, item, group, size, future))
            if group is not None:
                for (of, _), gathering in self._gatherings.items():
                    if of == priority:
                        gathering.arrived(time.monotonic())
            self._ready.notify()
        return future

    def describe(self) -> Iterator[str]:
        """What waits for the compute thread now, a line for each client: for people."""
        with self._ready:
            waiting = {
                name: ", ".join(f"{len(flow.work)} {priority.name}" for priority, flow in client.flows.items())
                for name, client in self._waiting.items()
                if client.has_work
            }
        yield f"work of {len(waiting)} clients waits for the compute thread"
        for name, work in waiting.items():
            yield f"    {name or 'this peer itself'}: {work}"

    def close(self) -> None:
        """Begin no more work. What is running runs on."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def _work(self) -> None:
        while True:
            with self._ready:
                queued = self._has_work()
                self._ready.wait_for(lambda: self._closed or self._has_work())
                ready = time.monotonic()
                waited_for = self._gather(queued)
                if self._closed:
                    return
                riders = [rider for rider in self._next() if not rider.work.future.cancelled()]
                begin = time.monotonic()
                gathering = self._gathering_of(riders[0].work, queued) if riders else None
                if gathering:
                    gathering.begins(ready, begin, len(riders), min(waited_for, len(riders) - 1))
            if riders:
                _run([rider.work for rider in riders])
                now = time.monotonic()
                if gathering:
                    gathering.ended(now)
                _charge(riders, now - begin)

    def _next(self) -> list[_Rider]:
        """The work whose turn it is, and what is done along with it."""
        client = min((client for client in self._waiting.values() if client.has_work), key=lambda client: client.turn)
        self._level = max(self._level, client.turn[0])
        flow = client.next_flow()
        client.level = max(client.level, flow.turn[0])
        head = _Rider(flow.work.popleft(), client, flow)
        return [head, *self._join(head.work)]

    def _join(self, head: _Work) -> Iterator[_Rider]:
        """Small work first: it gains most and costs least."""
        if head.group is None:
            return
        riders = [rider for rider in self._all_waiting() if rider.work.group == head.group]
        left = self.joined_size
        for rider in sorted(riders, key=lambda rider: (rider.work.size, rider.work.number)):
            left -= rider.work.size
            if left < 0:
                return
            rider.flow.work.remove(rider.work)
            yield rider

    def _all_waiting(self) -> Iterator[_Rider]:
        for client in self._waiting.values():
            for flow in client.flows.values():
                for work in flow.work:
                    if not work.future.cancelled():
                        yield _Rider(work, client, flow)

    def _gather(self, queued: bool) -> int:
        """Wait a moment for more work that can be joined, if that pays. Returns how much has come."""
        before = self._joinable()
        gathering = self._gathering_of(before[0], queued) if before else None
        if not gathering or not gathering.pays:
            return 0
        self._ready.wait_for(
            lambda: self._closed or not 0 < len(self._joinable()) < gathering.expected, gathering.moment
        )
        return max(0, len(self._joinable()) - len(before))

    def _joinable(self) -> list[_Work]:
        """The waiting work; none when any is to be done by itself, or is of another priority."""
        works = [rider.work for rider in self._all_waiting()]
        is_alike = len({work.priority for work in works}) == 1
        return works if is_alike and all(work.group is not None for work in works) else []

    def _gathering_of(self, work: _Work, queued: bool) -> Gathering | None:
        if work.group is None:
            return None
        return self._gatherings.get((work.priority, queued), self._gatherings[work.priority, False])

    def _has_work(self) -> bool:
        """Also forgets clients that have no work and no debt."""
        for name in [name for name, c in self._waiting.items() if not c.has_work and c.used <= self._level]:
            del self._waiting[name]
        return any(client.has_work for client in self._waiting.values())


def _charge(riders: Sequence[_Rider], seconds: float) -> None:
    """Each client its part of the time."""
    total = sum(rider.work.size for rider in riders)
    for rider in riders:
        share = seconds * rider.work.size / total
        rider.client.used += share
        rider.flow.used += share


def _run(works: Sequence[_Work]) -> None:
    outcomes: Sequence[Any]
    try:
        outcomes = works[0].run([work.item for work in works])
    except BaseException as error:
        outcomes = [error] * len(works)
    with suppress(RuntimeError):  # the loop has closed: nobody waits
        works[0].future.get_loop().call_soon_threadsafe(_settle, works, outcomes)


def _settle(works: Sequence[_Work], outcomes: Sequence[Any]) -> None:
    for work, outcome in zip(works, outcomes, strict=True):
        if work.future.done():
            continue
        if isinstance(outcome, BaseException):
            work.future.set_exception(outcome)
        else:
            work.future.set_result(outcome)
