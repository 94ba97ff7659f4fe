"""A training call on all hops of a route at once: each peer hands its result to the next.

The client's link carries a micro-batch once out and once back, however many spans there are. What passes between the
peers is not seen here, so what fails is done again from the input.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from client.requests.caller import Caller, Gradients
from client.requests.handover import boundaries
from client.requests.work import Work
from client.swarm.loop import settle
from client.swarm.routes import Hop
from protocol.errors import SwarmError, UnknownCall

T = TypeVar("T")


class HopFailed(Exception):
    """One hop of a relay failed, and with it the whole."""

    def __init__(self, hop: Hop, error: SwarmError):
        super().__init__(str(error))
        self.hop, self.error = hop, error


@dataclass(frozen=True)
class Relayed:
    """A forward that was relayed: what its backward needs."""

    hops: tuple[Hop, ...]
    call_ids: tuple[int, ...]
    hidden: torch.Tensor
    """That went into the first hop."""


class Relay:
    """Training calls on all hops at once. All methods raise `HopFailed`; then no part of the result counts."""

    def __init__(self, caller: Caller):
        self._caller = caller

    async def forward(
        self, work: Work, hops: Sequence[Hop], hidden: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, Relayed]:
        """Hidden states after `hops`, and what `backward` needs."""
        edges = boundaries(self._caller.swarm, hops, "hidden_states")
        answers = await _all(
            (hop, partial(self._caller.forward, work, hop, hidden, keep, before, after))
            for hop, before, after in zip(hops, edges, edges[1:], strict=False)
        )
        return answers[-1][0], Relayed(tuple(hops), tuple(call_id for _, call_id in answers), hidden)

    async def backward(self, work: Work, relayed: Relayed, grad: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        """The gradient of the input, and of adapters and prefixes by name."""
        hops, call_ids = relayed.hops[::-1], relayed.call_ids[::-1]
        if 0 in call_ids:
            raise HopFailed(hops[call_ids.index(0)], UnknownCall("The peer kept no activations."))
        edges = boundaries(self._caller.swarm, hops, "grad")
        answers = await _all(
            (hop, partial(self._caller.backward, work, hop, relayed.hidden, grad, call_id, before, after))
            for hop, call_id, before, after in zip(hops, call_ids, edges, edges[1:], strict=False)
        )
        total: Gradients = {}
        for _, gradients in answers:
            total |= gradients
        return answers[-1][0], total


async def _all(requests: Iterable[tuple[Hop, Callable[[], Coroutine[Any, Any, T]]]]) -> list[T]:
    async def ask(hop: Hop, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await request()
        except SwarmError as error:
            raise HopFailed(hop, error) from error

    return await settle([asyncio.create_task(ask(*pair)) for pair in requests])
