"""Training calls that wait for their turn; small ones are run together where that can be.

They run side by side (`peer.training.joined.side_by_side`), so that each weight is read once for all of them (`peer.training.joined.products`). Whatever
else there is to a call is as if it had run alone: its activations, its backward, its failures are its own.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from peer.compute.tally import Tally
from peer.training.joined.side_by_side import MOST, run_together
from peer.training.trainer import Call, Trainer
from protocol.errors import SwarmError


@dataclass(frozen=True, eq=False)
class Task:
    """A training call that waits."""

    work: Callable[[], Any]
    size: int
    """Tokens, of all rows."""
    group: Hashable | None
    """Tasks of one group may be run together; `None`: on its own."""


class CallRunner:
    """Makes tasks of training calls, and runs them. What runs them belongs on the compute thread.

    `joined_tokens`: calls of at most so many tokens may be run together with others.
    """

    def __init__(self, trainer: Trainer, joined_tokens: int):
        self._trainer, self._joined_tokens = trainer, joined_tokens
        self.tally = Tally()

    def forward(self, call: Call, owner: str, keep: bool) -> Task:
        """See `Trainer.forward`."""
        return self._task(partial(self._trainer.forward, call, owner, keep), call, "forward")

    def backward(self, call: Call, grad: torch.Tensor) -> Task:
        """See `Trainer.backward`."""
        return self._task(partial(self._trainer.backward, call, grad), call, "backward")

    def backward_kept(self, call_id: int, owner: str, grad: torch.Tensor) -> Task:
        """See `Trainer.backward_kept`."""
        work, size = partial(self._trainer.backward_kept, call_id, owner, grad), _tokens(grad)
        joins = size <= self._joined_tokens and self._trainer.meets(call_id)
        return Task(work, size, "backward of kept" if joins else None)

    def forget(self, owner: str) -> None:
        """See `Trainer.forget`."""
        self._trainer.forget(owner)

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """What each of `tasks`, which are of one group, returned or raised."""
        outcomes: list[Any] = []
        with ExitStack() as stack:
            if tasks[0].group is not None:
                stack.enter_context(self._trainer.products.meeting())
            for start in range(0, len(tasks), MOST):
                outcomes += self._run_at_once([task.work for task in tasks[start : start + MOST]])
        return outcomes

    def _run_at_once(self, works: Sequence[Callable[[], Any]]) -> list[Any]:
        self.tally.count(len(works))
        if len(works) == 1:
            return [_attempt(works[0])]
        outcomes = run_together(works)
        for number, work in enumerate(works):
            if isinstance(outcomes[number], Exception) and not isinstance(outcomes[number], SwarmError):
                outcomes[number] = None  # and with it the memory that its traceback holds
                outcomes[number] = _attempt(work)
        return outcomes

    def _task(self, work: Callable[[], Any], call: Call, kind: str) -> Task:
        size, mode = _tokens(call.inputs.hidden), call.mode
        joins = size <= self._joined_tokens and self._can_join(call)
        return Task(work, size, (kind, mode.blocks, mode.training) if joins else None)

    def _can_join(self, call: Call) -> bool:
        """Dropout is drawn from one generator for all, and other adapters' module trees hold one client's tensors."""
        mode, bundle = call.mode, call.bundle
        if mode.dropout_seed is not None or mode.autocast is not None or call.prefix:
            return False
        if bundle is None:
            return self._trainer.products.have(())
        if bundle.lora is None or (mode.training and bundle.manifest.has_dropout):
            return False
        return self._trainer.products.have(bundle.lora.deltas)


def _attempt(work: Callable[[], Any]) -> Any:
    """What it returns or raises."""
    try:
        return work()
    except Exception as error:
        return error


def _tokens(states: torch.Tensor) -> int:
    return states.shape[:2].numel()
