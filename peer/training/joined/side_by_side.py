"""Functions that run side by side, one at a time, and do once for all what they have in common.

Each runs on a thread of its own until it comes to a place where it may meet others. When all wait at some place, or
have ended, the caller's thread does the common work of those at one place, and they go on. The place that lies farthest
behind is served first; so a function that has gone another way than the others meets them again where the ways do.
Threads and not greenlets (`peer.generation.joined.lockstep`), because autograd's backward pass cannot be left in the
middle by other means.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

MOST = 8
"""Functions at once: each further one saves less of the common work than the one before."""
Work = Callable[[Sequence[Any]], Sequence[Any]]
"""Takes the items of those who meet, and returns a result for each. Runs on the thread of `run_together`."""


@dataclass(frozen=True)
class Place:
    """Where functions can meet. Places are equal when all of their parts are."""

    order: tuple[int, int]
    """The lower, the earlier functions come to it."""
    work: Work

    @classmethod
    def forward(cls, number: int, work: Work) -> Self:
        """The place before all of higher numbers, and before all places of backward passes."""
        return cls((0, number), work)

    @classmethod
    def backward(cls, number: int, work: Work) -> Self:
        """The place after all of higher numbers: a backward pass comes to them in the reverse order."""
        return cls((1, -number), work)


@dataclass(frozen=True)
class _End:
    """A function has returned, or raised."""

    outcome: Any


class _Member:
    """One function under way. `resume` is for the caller's thread, the rest for the function's own."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._answers, self._wishes = SimpleQueue[Any](), SimpleQueue[tuple[Place, Any] | _End]()

    def run(self) -> None:
        token = _member.set(self)
        try:
            self._wait()
            self._wishes.put(_End(self._function()))
        except BaseException as error:  # no other name for it: with its traceback it would hold this frame, and itself
            self._wishes.put(_End(error))
        finally:
            _member.reset(token)

    def meet(self, place: Place, item: Any) -> Any:
        self._wishes.put((place, item))
        return self._wait()

    def _wait(self) -> Any:
        answer = self._answers.get()
        try:
            if isinstance(answer, BaseException):
                raise answer
            return answer
        finally:
            del answer  # as in `run`

    def give_up(self) -> None:
        """Have it end, should it ever begin."""
        self._answers.put(RuntimeError("Another of these functions could not be begun."))

    def resume(self, answer: Any) -> tuple[Place, Any] | _End:
        """Let it run until it waits again: at which place, with which item; or its end."""
        self._answers.put(answer)
        return self._wishes.get()


_member: ContextVar[_Member | None] = ContextVar("member", default=None)


def meet(place: Place, item: Any) -> Any:
    """The result of `place.work` for `item`, which runs once for all who are there; raises what it raises.

    A function that runs by itself does the work for its own item.
    """
    member = _member.get()
    return member.meet(place, item) if member else place.work([item])[0]


def run_together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of `functions` returned or raised, which meet on their way."""
    members = [_Member(function) for function in functions]
    threads = [Thread(target=member.run, name="side by side", daemon=True) for member in members]
    try:
        for thread in threads:
            thread.start()
    except BaseException:  # no more threads to be had
        for member in members:
            member.give_up()
        raise
    ends = _lead(members)
    for thread in threads:
        thread.join()  # nothing of them is left then, least of all memory
    return [ends[member] for member in members]


def _lead(members: Sequence[_Member]) -> dict[_Member, Any]:
    """From meeting to meeting, until all have ended: with what."""
    ends = dict[_Member, Any]()
    waiting = dict[_Member, tuple[Place, Any]]()

    def resume(member: _Member, answer: Any) -> None:
        wish = member.resume(answer)
        if isinstance(wish, _End):
            ends[member] = wish.outcome
        else:
            waiting[member] = wish

    for member in members:
        resume(member, None)
    while waiting:
        place = min((place for place, _ in waiting.values()), key=lambda place: place.order)
        there = [member for member, (at, _) in waiting.items() if at == place]
        items = [waiting.pop(member)[1] for member in there]
        for member, answer in zip(there, _answers(place, items), strict=True):
            resume(member, answer)
    return ends


def _answers(place: Place, items: Sequence[Any]) -> Sequence[Any]:
    """The results of a place's work. Work that failed for all is tried for each: nobody fails for another's sake."""
    try:
        return place.work(items)
    except Exception as error:
        if len(items) == 1:
            return [error.with_traceback(None)]  # whose frames would lead to all that there is
    return [_answers(place, [item])[0] for item in items]
