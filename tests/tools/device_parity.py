"""The same span on two devices: do both give the same numbers?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peer.span.span import Inputs, Mode, Span
from peer.start.trial import relative_error
from peer.training.call import TrainingCall
from peer.training.joined.together import Together
from peer.training.runner import TrainingRunner
from peer.training.trainer import Trainer
from protocol.errors import SwarmError
from tests.tools.desk import Desk, play
from tests.tools.spans import states

Numbers = dict[str, list[torch.Tensor]]
"""What was run -> what came out, on the CPU."""
_AMPLE = 10**9


@dataclass(frozen=True)
class Way:
    """How a span's steps and training calls are served."""

    joiner: str
    """The name of what joins sessions, or "none"."""
    arena: int
    """Blocks whose keys and values lie in an arena."""


def run_all(span: Span) -> tuple[Numbers, Way]:
    """Sessions' steps one by one and joined, with all edits; training calls of every kind, with a mask and without."""
    desk = Desk(span)
    joiner = desk.runner._joiner
    numbers = {"steps": list(play(desk, desk.each, keep_past=False))}
    if joiner:
        numbers["joined steps"] = list(play(desk, desk.run, keep_past=False))
    way = Way(type(joiner).__name__ if joiner else "none", len(desk._memory.arena._stores))
    return numbers | dict(_train(span, desk)), way


def _train(span: Span, desk: Desk) -> Iterator[tuple[str, list[torch.Tensor]]]:
    trainer = Trainer(span, desk.store, _AMPLE, _AMPLE)
    runner = TrainingRunner(trainer, Together(span, 64))
    calls = [_call(span, 2, 9, padding=2), _call(span, 1, 5), _call(span, 1, 7, padding=1)]
    results = [trainer.forward(call, "me", keep=True) for call in calls]
    yield "forward", [hidden for hidden, _ in results]
    sizes = (call.inputs.hidden.shape[:2] for call in calls)
    grads = [states(rows, tokens, 30 + number) for number, (rows, tokens) in enumerate(sizes)]
    yield (
        "backward",
        _gradients(
            trainer.backward_kept(call_id, "me", grad) for (_, call_id), grad in zip(results, grads, strict=True)
        ),
    )
    yield "joined training", _joined(runner, calls, grads)
    trainer.kept.max_bytes = max(map(trainer.footprint.of_checkpoints, calls))
    yield "block by block", _gradients(trainer.backward(*pair) for pair in zip(calls, grads, strict=True))


def _call(span: Span, rows: int, tokens: int, padding: int = 0) -> TrainingCall:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :padding] = 0
    inputs = Inputs(states(rows, tokens, tokens), mask if padding else None)
    return TrainingCall(inputs, Mode(span.blocks, training=True), None, {})


def _joined(runner: TrainingRunner, calls: Sequence[TrainingCall], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    results = _run(runner, [runner.forward(call, f"client {n}", True) for n, call in enumerate(calls)])
    kept = [
        runner.backward_kept(call_id, f"client {n}", grad)
        for n, ((_, call_id), grad) in enumerate(zip(results, grads, strict=True))
    ]
    return [hidden for hidden, _ in results] + _gradients(_run(runner, kept))


def _run(runner: TrainingRunner, tasks: Sequence[Any]) -> list[Any]:
    """Those of one group together, as the scheduler would."""
    outcomes = runner.run(tasks) if tasks[0].group else [runner.run([task])[0] for task in tasks]
    for outcome in outcomes:
        if isinstance(outcome, Exception | SwarmError):
            raise outcome
    return outcomes


def _gradients(answers: Any) -> list[torch.Tensor]:
    return [tensor for answer in answers for tensor in answer.values()]


def differences(ours: Numbers, theirs: Numbers) -> dict[str, float]:
    """The largest error of each, relative to the largest value; 0.0: equal bit for bit."""
    return {
        name: max(
            0.0 if torch.equal(mine, other) else relative_error(mine, other)
            for mine, other in zip(ours[name], theirs[name], strict=True)
        )
        for name in theirs.keys() & ours.keys()
    }
