"""Ways for a real peer to answer wrongly, or late."""

import asyncio
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from peer.generation.steps import StepRunner
from peer.service import connection
from peer.service.handover import Outbox
from peer.span.span import Span
from peer.training.runner import TrainingRunner
from peer.training.trainer import Trainer
from protocol.weights.parts import Held

_BEAT = 0.05
_LITTLE = 3000
"""Bytes: less than most calls of a small model take."""


def begin_to_lie(kind: str) -> None:
    """Make this process's peer lie: `outputs`, `subtle` ones, `gradients`, answers `replayed`; or be `slow`.

    `cut off`: it reaches no other peer; `loses pushes`: what it pushes never comes; `hangs on pushes`: the next peer
    takes some of its signs of life to be found out of reach.

    `lacks memory`: on the pretended GPU there is next to no memory for one call in ten.
    `weights`: a bit of each piece that it gives is another.

    `device fails`: its backward passes fail as on a GPU that takes an illegal access; `device is lost`: for good.
    """
    if kind in ("device fails", "device is lost"):
        _change(Trainer, "backward", _fail)
        if kind == "device is lost":
            _change(Span, "computes", lambda found: False)
        return
    if kind in ("cut off", "loses pushes", "hangs on pushes"):
        hangs = kind == "hangs on pushes"
        connection.HEARTBEAT = _BEAT if hangs else connection.HEARTBEAT
        _push_nothing(says=kind == "loses pushes", after=10 * _BEAT if hangs else 0.0)
        return
    if kind == "lacks memory":
        _take_memory_away()
        return
    if kind == "weights":
        _change(Held, "read", lambda data: bytes([data[0] ^ 1]) + data[1:])
        return
    if kind == "slow":
        for owner, name in ((StepRunner, "run"), (Trainer, "forward")):
            _change(owner, name, lambda found: (time.sleep(0.2), found)[1])
        return
    if kind == "gradients":
        for name in ("backward", "backward_kept"):
            _change(Trainer, name, lambda found: {key: -tensor for key, tensor in found.items()})
        return
    twist = _Replay() if kind == "replayed" else _Noise({"outputs": 1.0, "subtle": 0.05}[kind])
    _change(StepRunner, "run", lambda found: [twist(one) if isinstance(one, torch.Tensor) else one for one in found])
    _change(Trainer, "forward", lambda found: (twist(found[0]), found[1]))


def _fail(_: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _take_memory_away() -> None:
    gpu, chance = sys.modules["tests.tools.pretended_gpu"].device, random.Random(1)

    def scarce(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            ample = gpu.bytes_limit()
            if chance.random() < 0.1:
                gpu.limit(gpu.bytes_now() + chance.randrange(_LITTLE))
            try:
                return run(*args)
            finally:
                gpu.limit(ample)

        return call

    for owner in (StepRunner, TrainingRunner):
        owner.run = scarce(owner.run)  # type: ignore[method-assign]


def _push_nothing(says: bool, after: float) -> None:
    async def push(*args: Any) -> bool:
        await asyncio.sleep(after)
        return says

    Outbox.push = push  # type: ignore[method-assign]


def _change(owner: type, name: str, change: Callable[[Any], Any]) -> None:
    honest = getattr(owner, name)

    def lie(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(honest(self, *args, **kwargs))

    setattr(owner, name, lie)


class _Noise:
    """Adds noise of a part of the answer's own size."""

    def __init__(self, size: float):
        self._size = size

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self._size * hidden.std() * torch.randn_like(hidden)


class _Replay:
    """Answers with what was right the first time, whatever is asked."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._answers.setdefault(tuple(hidden.shape), hidden)
