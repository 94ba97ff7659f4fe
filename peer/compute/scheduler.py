"""Which work runs next on the device: one compute thread, its time shared fairly between clients.

Start-time fair queuing (Goyal et al. 1996) over measured seconds: the client that has had the least goes first. One
that comes back from a pause starts level with the others: it has saved up nothing. The same rule shares a client's own
time between its generations and its training.

Work of one group that waits at the same time is done in one pass, whoever sent it, and each client is charged its part
of the pass's time. `peer.compute.batching_window` decides whether a pass waits for work that comes a moment later.
"""

import asyncio
import itertools
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

from peer.compute.batching_window import BatchingWindow
from peer.compute.failures import let_go

T = TypeVar("T")
Item = TypeVar("Item")

_HEAD_START = 0.1
"""Seconds of computing by which a step of a generation may run ahead of its client's share."""
_AFTER_A_PAUSE, _QUEUED = (0.15, 0.02), (0.8, 0.1)
"""How long a pass may wait for more work, as a share of the last one's time and in seconds at most: a pass that begins
after a pause, and one whose work has queued behind another. More passes then go round between clients and peers than
are needed, and the next work is worth waiting for even if it takes most of a pass: from then on, round after round, the
two are one. Eight clients of one peer decode 1.4 times as fast (`python -m benchmarks.many --peers 1`). A whole pass's
time would be too much: so late comes what is on its way through another peer, as it should be."""
_OF_LATE = 1.0
"""Seconds after its last work in which this peer still counts as at work: the next step is on its way."""
_REST = 10.0
"""Seconds without work after which this peer is at rest."""


class Priority(IntEnum):
    """Lower has a head start."""

    STEP = 0
    """A step of a generation: somebody waits for every single one."""
    CALL = 1
    """A forward or a backward of training, or an adapter being put."""


@dataclass
class _Flow:
    """One client's work of one priority, oldest first, and the seconds that it is taken to have had."""

    head_start: float
    used: float = 0.0
    work: "deque[_Work]" = field(default_factory=deque)


@dataclass
class _Client:
    """One client's flows, and the seconds of computing that it is taken to have had."""

    used: float
    level: float = 0.0
    """The turn of the flow served last: where a flow starts that was empty."""
    waiting: int = 0
    """Pieces of work in its flows."""
    flows: dict[Priority, _Flow] = field(
        default_factory=lambda: {Priority.STEP: _Flow(_HEAD_START), Priority.CALL: _Flow(0.0)}
    )

    def next_flow(self) -> _Flow:
        """The one whose turn it is, of those that have work."""
        flows = [flow for flow in self.flows.values() if flow.work]
        return min(flows, key=_turn_of_flow) if len(flows) > 1 else flows[0]


@dataclass(frozen=True, eq=False)
class _Work:
    """Work that waits or runs, and who pays for it."""

    number: int
    priority: Priority
    run: Callable[[list[Any]], Sequence[Any]]
    item: Any
    group: Hashable | None
    size: int
    future: asyncio.Future[Any]
    client: _Client
    flow: _Flow


class Scheduler:
    """Runs submitted work on a thread of its own, and hands results to the event loop.

    `joined_size`: how much work, in sizes as `submit_batched` is told, may be done along with that whose turn it is.
    `at_rest` is called on the thread when there has been no work for `rest` seconds, once until there is some again.
    """

    def __init__(
        self, joined_size: int = 512, at_rest: Callable[[], object] = lambda: None, rest: float = _REST
    ) -> None:
        self.joined_size = joined_size
        self._at_rest, self._rest = at_rest, rest
        self._clients: dict[str, _Client] = {}
        """Those that have work, or have had more than others."""
        self._waiting = 0
        """Pieces of work in all flows."""
        self._batchable = Counter[Priority]()
        """Priority -> pieces of waiting work that have a group."""
        self._level = 0.0
        """The turn of the work begun last: where newcomers start."""
        self._numbers = itertools.count()
        self._ready = threading.Condition()
        self._closed = False
        self._last_work = float("-inf")
        self._windows: dict[Priority, tuple[BatchingWindow, ...]] = {
            Priority.STEP: (BatchingWindow(*_AFTER_A_PAUSE), BatchingWindow(*_QUEUED)),
            Priority.CALL: (BatchingWindow(*_AFTER_A_PAUSE),),
        }
        """By priority: for passes after a pause, and for those whose work has queued. Training calls have one for both,
        as they gain less by company than they would lose."""
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, priority: Priority, function: Callable[[], T], client: str = "") -> "asyncio.Future[T]":
        """Queue `function` for a client; the future belongs to the running loop. Cancelled work is not begun."""
        return self.submit_batched(priority, lambda _: [function()], None, client)

    def submit_batched(
        self,
        priority: Priority,
        run: Callable[[list[Item]], Sequence[T | BaseException]],
        item: Item,
        client: str = "",
        group: Hashable | None = None,
        size: int = 1,
    ) -> "asyncio.Future[T]":
        """Queue `item` for `run`, which gets others of the same group along with it and returns what became of each.

        `size`: the item's part of what such a pass costs. Without a group `run` gets this item only.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._ready:
            owner = self._clients.get(client)
            if owner is None:
                owner = self._clients[client] = _Client(self._level)
            if not owner.waiting:
                owner.used = max(owner.used, self._level)
            flow = owner.flows[priority]
            if not flow.work:
                flow.used = max(flow.used, owner.level)
            self._put(_Work(next(self._numbers), priority, run, item, group, size, future, owner, flow))
            if group is not None:
                for window in self._windows[priority]:
                    window.arrived(time.monotonic())
            self._ready.notify()
        return future

    def describe(self) -> Iterator[str]:
        """What waits for the compute thread now, a line for each client: for people."""
        with self._ready:
            waiting = {
                name: ", ".join(f"{len(flow.work)} {priority.name}" for priority, flow in client.flows.items())
                for name, client in self._clients.items()
                if client.waiting
            }
        yield f"work of {len(waiting)} clients waits for the compute thread"
        for name, work in waiting.items():
            yield f"    {name or 'this peer itself'}: {work}"

    @property
    def is_at_work(self) -> bool:
        """Whether something is computed, or was a moment ago."""
        return self._last_work > time.monotonic() - _OF_LATE

    def close(self) -> None:
        """Begin no more work. What is running runs on."""
        with self._ready:
            self._closed = True
            self._ready.notify()

    def _work(self) -> None:
        while self._run_next(self._wait_for_work()):
            pass

    def _run_next(self, has_queued: bool) -> bool:
        """Run what is next. Returns whether there will be more."""
        with self._ready:
            ready = time.monotonic()
            waited_for = self._wait_for_more(has_queued)
            if self._closed:
                return False
            batch = [work for work in self._next() if not work.future.cancelled()]
            is_batched = batch and batch[0].group is not None
            window = self._window(batch[0].priority, has_queued) if is_batched else None
            begin = time.monotonic()
            if window:
                window.started(ready, begin, len(batch), min(waited_for, len(batch) - 1))
        if batch:
            self._last_work = math.inf
            _run(batch)
            self._last_work = now = time.monotonic()
            if window:
                window.ended(now)
            _charge(batch, now - begin)
        del batch  # an error's frames lead here, and the batch to the error: see `_run`
        return True

    def _wait_for_work(self) -> bool:
        """Returns whether it has queued behind other work."""
        with self._ready:
            self._forget_clients()
            if self._is_awake():
                return True
            if self._ready.wait_for(self._is_awake, self._rest):
                return False
        self._at_rest()  # without the lock: the loop must not wait for it
        with self._ready:
            self._ready.wait_for(self._is_awake)
        return False

    def _is_awake(self) -> bool:
        return self._waiting > 0 or self._closed

    def _window(self, priority: Priority, has_queued: bool) -> BatchingWindow:
        after_a_pause, *queued = self._windows[priority]
        return queued[0] if queued and has_queued else after_a_pause

    def _wait_for_more(self, has_queued: bool) -> int:
        """Wait a moment for more work to be batched, if that pays. Returns how much has come."""
        for priority in Priority:
            window = self._window(priority, has_queued)
            if window.pays and not self._is_due(priority, window):
                before = self._waiting
                self._ready.wait_for(partial(self._is_due, priority, window), window.moment)
                return self._waiting - before if self._is_batchable(priority) else 0
        return 0

    def _is_due(self, priority: Priority, window: BatchingWindow) -> bool:
        """Whether no more work of this priority is worth waiting for."""
        return self._closed or not self._is_batchable(priority) or self._waiting >= window.expected

    def _is_batchable(self, priority: Priority) -> bool:
        """Whether all waiting work is of this priority, and none of it has to be done by itself."""
        return self._batchable[priority] == self._waiting

    def _next(self) -> list[_Work]:
        """The work whose turn it is, and what is done along with it; small work first: it gains most, costs least."""
        clients = [client for client in self._clients.values() if client.waiting]
        client = min(clients, key=_turn_of_client) if len(clients) > 1 else clients[0]
        flow = client.next_flow()
        self._level = max(self._level, client.used - flow.head_start)
        client.level = max(client.level, flow.used - flow.head_start)
        batch = [flow.work[0]]
        if self._waiting > 1 and batch[0].group is not None:
            left = self.joined_size
            for work in sorted(self._others_of_group(batch[0]), key=lambda work: (work.size, work.number)):
                left -= work.size
                if left < 0:
                    break
                batch.append(work)
        for work in batch:
            self._take(work)
        return batch

    def _others_of_group(self, head: _Work) -> list[_Work]:
        return [
            work
            for client in self._clients.values()
            for flow in client.flows.values()
            for work in flow.work
            if work.group == head.group and work is not head and not work.future.cancelled()
        ]

    def _put(self, work: _Work) -> None:
        work.flow.work.append(work)
        work.client.waiting += 1
        self._waiting += 1
        self._batchable[work.priority] += work.group is not None

    def _take(self, work: _Work) -> None:
        work.flow.work.remove(work)
        work.client.waiting -= 1
        self._waiting -= 1
        self._batchable[work.priority] -= work.group is not None

    def _forget_clients(self) -> None:
        """Those that have no work, and have had no more than others."""
        for name in [name for name, one in self._clients.items() if not one.waiting and one.used <= self._level]:
            del self._clients[name]


def _turn_of_flow(flow: _Flow) -> tuple[float, int]:
    """The least goes first."""
    return flow.used - flow.head_start, flow.work[0].number


def _turn_of_client(client: _Client) -> tuple[float, int]:
    """The least goes first."""
    flow = client.next_flow()
    return client.used - flow.head_start, flow.work[0].number


def _charge(batch: Sequence[_Work], seconds: float) -> None:
    """Each client its part of the time."""
    total = sum(work.size for work in batch)
    for work in batch:
        share = seconds * work.size / total
        work.client.used += share
        work.flow.used += share


def _run(batch: Sequence[_Work]) -> None:
    outcomes: Sequence[Any]
    try:
        outcomes = batch[0].run([work.item for work in batch])
    except BaseException as error:
        outcomes = [error] * len(batch)
    let_go(*(outcome for outcome in outcomes if isinstance(outcome, BaseException)))
    with suppress(RuntimeError):  # the loop has closed: nobody waits
        batch[0].future.get_loop().call_soon_threadsafe(_settle, batch, outcomes)
    # Frames that an error's traceback leads to lead to their callers, so to this one. What it has would lead back to
    # the error, and such a circle holds memory until the garbage collector comes.
    del batch, outcomes


def _settle(batch: Sequence[_Work], outcomes: Sequence[Any]) -> None:
    for work, outcome in zip(batch, outcomes, strict=True):
        if work.future.done():
            continue
        if isinstance(outcome, BaseException):
            work.future.set_exception(outcome)
        else:
            work.future.set_result(outcome)
