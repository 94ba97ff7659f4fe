"""A hop's answer computed again, uncoded, by other peers: what a `Verifier` compares it with."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from client.requests.caller import Caller, Gradients
from client.requests.work import Codecs, Work
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol.errors import SwarmError


@dataclass(frozen=True)
class ForwardAgain:
    """Computes a hop's forward again, from the hidden states that its peer received."""

    caller: Caller
    work: Work
    hop: Hop
    hidden: torch.Tensor
    tokens: int | None = None
    """How many of the last tokens belong to the answer that is compared; None: all."""

    async def __call__(self, without: Collection[str]) -> tuple[Mapping[str, torch.Tensor], list[Hop]]:
        """The hidden states after the hop's blocks, and the hops that they took. Raises `SwarmError`."""
        swarm, work = self.caller.swarm, replace(self.work, codecs=Codecs())
        hidden, route = self.hidden, await swarm.find_route(self.hop.start, self.hop.end, "forward", without)
        for other in route:
            with _blaming(swarm, other):
                hidden, _ = await self.caller.forward(work, other, hidden, keep=False)
        return {"hidden_states": hidden if self.tokens is None else hidden[:, -self.tokens :]}, route


@dataclass(frozen=True)
class BackwardAgain:
    """Computes a hop's backward again, from the hidden states and the gradient that its peer received."""

    caller: Caller
    work: Work
    hop: Hop
    hidden: torch.Tensor
    grad: torch.Tensor

    async def __call__(self, without: Collection[str]) -> tuple[Mapping[str, torch.Tensor], list[Hop]]:
        """The gradients, that of the hop's input among them, and the hops that they took. Raises `SwarmError`."""
        swarm, work = self.caller.swarm, replace(self.work, codecs=Codecs())
        route = await swarm.find_route(self.hop.start, self.hop.end, "forward", without)
        inputs = [self.hidden]
        for other in route[:-1]:
            with _blaming(swarm, other):
                hidden, _ = await self.caller.forward(work, other, inputs[-1], keep=False)
            inputs.append(hidden)
        grad, total = self.grad, Gradients()
        for other, hidden in zip(reversed(route), reversed(inputs), strict=True):
            with _blaming(swarm, other):
                grad, gradients = await self.caller.backward(work, other, hidden, grad, 0)
            total |= gradients
        return {"hidden_states": grad, **total}, route


@contextmanager
def _blaming(swarm: Swarm, hop: Hop) -> Iterator[None]:
    try:
        yield
    except SwarmError as error:
        swarm.blame(hop.peer, error)
        raise
