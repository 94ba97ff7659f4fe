"""Training calls that wait for their turn; small ones are run together where that can be."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from peer.compute.batch_counts import BatchCounts
from peer.training.call import TrainingCall
from peer.training.joined.together import Together
from peer.training.trainer import Trainer
from protocol.errors import SwarmError
from protocol.records import Trainable


@dataclass(frozen=True, eq=False)
class Task:
    """A training call that waits."""

    alone: Callable[[], Any]
    """Runs it by itself."""
    size: int
    """Tokens, of all rows."""
    group: Hashable | None = None
    """Tasks of one group may be run together; `None`: on its own."""
    beside: Callable[[], Any] | None = None
    """Runs it side by side with others; `None`: as alone."""
    prepare: Callable[[], Any] | None = None
    """Runs before those that run side by side."""


class TrainingRunner:
    """Makes tasks of training calls, and runs them. What runs them belongs on the compute thread.

    `together`: how calls of several clients are run together; `None`: not at all.
    """

    def __init__(self, trainer: Trainer, together: Together | None = None):
        self._trainer, self._together = trainer, together
        self.counts = BatchCounts()

    @property
    def trainable(self) -> Trainable | None:
        """See `Trainer.trainable`."""
        return self._trainer.trainable

    def forward(self, call: TrainingCall, owner: str, keep: bool) -> Task:
        """See `Trainer.forward`."""
        return self._task(partial(self._trainer.forward, owner=owner, keep=keep), call, "forward")

    def backward(self, call: TrainingCall, grad: torch.Tensor) -> Task:
        """See `Trainer.backward`. `grad`: (rows, tokens, hidden size)."""
        return self._task(partial(self._trainer.backward, grad=grad), call, "backward")

    def backward_kept(self, call_id: int, owner: str, grad: torch.Tensor) -> Task:
        """See `Trainer.backward_kept`. `grad`: (rows, tokens, hidden size)."""
        work, size, together = partial(self._trainer.backward_kept, call_id, owner, grad), _tokens(grad), self._together
        if together is None or size > together.most_tokens or not self._trainer.kept.meets(call_id):
            return Task(work, size)
        return Task(work, size, "backward of kept")

    @property
    def kept_bytes(self) -> int:
        """Of what forwards left for their backwards."""
        return self._trainer.kept.size

    def give_way(self) -> None:
        """See `Trainer.give_way`."""
        self._trainer.give_way()

    def forget(self, owner: str) -> None:
        """Drop everything kept for a client that has gone."""
        self._trainer.kept.forget(owner)

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """What each of `tasks`, which are of one group, returned or raised."""
        if self._together is None or tasks[0].group is None:
            return [self._run_alone(task) for task in tasks]
        for task in tasks:
            if task.prepare:
                _attempt(task.prepare)
        outcomes: list[Any] = []
        with self._together.meeting():
            for start in range(0, len(tasks), self._together.most):
                outcomes += self._run_together(self._together, tasks[start : start + self._together.most])
        return outcomes

    def _run_alone(self, task: Task) -> Any:
        self.counts.count(1)
        return _attempt(task.alone)

    def _run_together(self, together: Together, tasks: Sequence[Task]) -> list[Any]:
        if len(tasks) == 1:
            return [self._run_alone(tasks[0])]
        self.counts.count(len(tasks))
        outcomes = together.run([task.beside or task.alone for task in tasks])
        for number, task in enumerate(tasks):
            if isinstance(outcomes[number], Exception) and not isinstance(outcomes[number], SwarmError):
                outcomes[number] = None  # and with it the memory that its traceback holds
                outcomes[number] = _attempt(task.alone)
        return outcomes

    def _task(self, run: Callable[..., Any], call: TrainingCall, kind: str) -> Task:
        size, mode, together = _tokens(call.inputs.hidden), call.mode, self._together
        if together is None or size > together.most_tokens or call.prefix or not together.takes(mode, call.adapter):
            return Task(partial(run, call), size)
        call = replace(call, meets=True)
        beside = partial(run, call, adding=together.adding)
        # What a new kind of call keeps is measured by running the span: not while others are half through it.
        prepare = partial(self._trainer.footprint.of, call)
        return Task(partial(run, call), size, (kind, mode.blocks, mode.training), beside, prepare)


def _attempt(work: Callable[[], Any]) -> Any:
    """What it returns or raises."""
    try:
        return work()
    except Exception as error:
        return error


def _tokens(states: torch.Tensor) -> int:
    return states.shape[:2].numel()
