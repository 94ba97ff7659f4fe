"""Training calls through the swarm: micro-batches in flight over all spans at once, each hop retried elsewhere."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from client.requests.caller import Caller, Gradients
from client.requests.handover import should_hand_over
from client.requests.work import Work
from client.swarm.loop import settle
from client.swarm.retries import Retries
from client.swarm.routes import Hop
from client.training.hop import Hops
from client.training.relay import HopFailed, Relay, Relayed
from protocol.errors import SwarmError, UnknownCall
from protocol.tensors import prefix_tokens

T = TypeVar("T")
_IN_FLIGHT = 32
"""Micro-batches at most: enough for every span to be busy, within what peers allow one client."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch, and how they are to be taken through blocks."""

    work: Work
    rows: slice
    trained: int
    """Tokens of a row, a prefix included, where a backward is to follow; else 0: peers need no memory for one."""


@dataclass(frozen=True)
class _Passed:
    """A hop that a micro-batch took forward: all that its backward needs, also on another peer."""

    hop: Hop
    hidden: torch.Tensor
    call_id: int


@dataclass(frozen=True)
class Trace:
    """The way of one micro-batch, which its backward goes back."""

    batch: MicroBatch
    hops: tuple[_Passed, ...]
    relayed: Relayed | None = None
    """All hops at once, when the peers handed their results to each other; then `hops` is empty."""


class TrainingCalls:
    """Forward and backward of batches over blocks."""

    def __init__(self, caller: Caller):
        self._swarm, self.loop = caller.swarm, caller.swarm.loop
        self._hops, self._relay = Hops(caller), Relay(caller)

    async def forward(
        self, work: Work, blocks: range, hidden: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, list[Trace]]:
        """Hidden states after `blocks`, (batch, tokens, hidden size), and the traces for `backward` when `keep`.

        Raises `NoRoute`, `TooLong` for rows that nobody can train, and what the last peer that was tried refused the
        call with.
        """
        tokens, trained = self._swarm.config.micro_batch_tokens, 0
        if keep:
            trained = hidden.shape[1] + prefix_tokens(work.prefix)
            tokens = min(tokens, await self._tokens_at_once(blocks, trained))
        batches = _split(work, hidden, tokens, trained)
        results = await _all(partial(self._forward, batch, blocks, hidden[batch.rows], keep) for batch in batches)
        outputs = [output for output, _ in results]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), [trace for _, trace in results]

    async def backward(self, traces: list[Trace], grad: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        """The gradient of the forward's input, and of adapters and prefix by name, summed over the micro-batches.

        Prefix gradients are those of the whole batch's rows. What no micro-batch's result depends on has no gradient.
        Raises as `forward`.
        """
        results = await _all(partial(self._backward, trace, grad[trace.batch.rows]) for trace in traces)
        if len(results) == 1:
            return results[0]
        total: Gradients = {}
        for name in dict.fromkeys(name for _, gradients in results for name in gradients):
            pieces = [gradients[name] for _, gradients in results if name in gradients]
            total[name] = torch.cat(pieces) if name.startswith("prefix.") else torch.stack(pieces).sum(0)
        return torch.cat([hidden for hidden, _ in results]), total

    async def _tokens_at_once(self, blocks: range, row: int) -> int:
        """Of all rows, each of `row` tokens: what the peers of a likely route say that they can train at a time."""
        route = await Retries(self._swarm, row).find_route(blocks.start, blocks.stop, "forward")
        said = [hop.peer.trainable.tokens for hop in route if hop.peer.trainable]
        return max(1, min(said, default=self._swarm.config.micro_batch_tokens))

    async def _forward(
        self, batch: MicroBatch, blocks: range, hidden: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, Trace]:
        """Forward by the peers themselves, from one to the next, where that is quicker and succeeds."""
        retries = Retries(self._swarm, batch.trained)
        route = await retries.find_route(blocks.start, blocks.stop, "forward")
        if should_hand_over(self._swarm, route):
            try:
                output, relayed = await self._relay.forward(batch.work, route, hidden, keep)
            except HopFailed as failure:
                retries.failed(failure.hop.peer, failure.error)
                retries = Retries(self._swarm, batch.trained)
                route = await retries.find_route(blocks.start, blocks.stop, "forward")
            else:
                return output, Trace(batch, (), relayed)
        return await self._forward_hop_by_hop(retries, route, batch, hidden, keep)

    async def _forward_hop_by_hop(
        self, retries: Retries, route: Sequence[Hop], batch: MicroBatch, hidden: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, Trace]:
        passed = list[_Passed]()

        async def go(hop: Hop) -> None:
            nonlocal hidden
            output, call_id = await self._hops.forward(batch.work, hop, hidden, keep)
            passed.append(_Passed(hop, hidden, call_id))
            hidden = output

        await retries.hop_by_hop(route, "forward", go)
        return hidden, Trace(batch, tuple(passed) if keep else ())

    async def _backward(self, trace: Trace, grad: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        if trace.relayed:
            return await self._backward_relayed(trace.batch, trace.relayed, grad)
        total: Gradients = {}
        for passed in reversed(trace.hops):
            grad, gradients = await self._backward_hop(trace.batch, passed, grad)
            total |= gradients
        return grad, total

    async def _backward_relayed(
        self, batch: MicroBatch, relayed: Relayed, grad: torch.Tensor
    ) -> tuple[torch.Tensor, Gradients]:
        """By the peers themselves; else all of it again from the input: what lay in between never came here."""
        try:
            return await self._relay.backward(batch.work, relayed, grad)
        except HopFailed as failure:
            if not isinstance(failure.error, UnknownCall):  # the activations are gone, and the peer is well
                Retries(self._swarm).failed(failure.hop.peer, failure.error)
        blocks = range(relayed.hops[0].start, relayed.hops[-1].end)
        return await self._backward_over(batch, blocks, relayed.hidden, grad)

    async def _backward_hop(
        self, batch: MicroBatch, passed: _Passed, grad: torch.Tensor
    ) -> tuple[torch.Tensor, Gradients]:
        """From the activations that the peer kept; else from the inputs, on this peer or on any others."""
        hop, work, retries = passed.hop, batch.work, Retries(self._swarm, batch.trained)
        if passed.call_id:
            try:
                return await self._hops.backward(work, hop, passed.hidden, grad, passed.call_id)
            except UnknownCall:
                pass
            except SwarmError as error:
                retries.failed(hop.peer, error)
        while True:
            route = await retries.find_route(hop.start, hop.end, "forward")
            if len(route) > 1:
                return await self._backward_over(batch, range(hop.start, hop.end), passed.hidden, grad)
            try:
                return await self._hops.backward(work, route[0], passed.hidden, grad, 0)
            except SwarmError as error:
                retries.failed(route[0].peer, error)

    async def _backward_over(
        self, batch: MicroBatch, blocks: range, hidden: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, Gradients]:
        """The blocks that were lost are now on several peers: go forward over them again, then back."""
        retries = Retries(self._swarm, batch.trained)
        route = await retries.find_route(blocks.start, blocks.stop, "forward")
        _, trace = await self._forward_hop_by_hop(retries, route, batch, hidden, keep=True)
        return await self._backward(trace, grad)


def _split(work: Work, hidden: torch.Tensor, tokens: int, trained: int) -> list[MicroBatch]:
    """Micro-batches by rows, of about `tokens` tokens, as even as can be."""
    rows, length = hidden.shape[:2]
    count = min(rows, -(-rows * length // tokens))
    if count == 1:
        return [MicroBatch(work, slice(0, rows), trained)]
    edges = [rows * i // count for i in range(count + 1)]
    return [
        MicroBatch(_rows_of(work, slice(begin, end), number), slice(begin, end), trained)
        for number, (begin, end) in enumerate(itertools.pairwise(edges))
    ]


def _rows_of(work: Work, rows: slice, number: int) -> Work:
    positions = work.positions
    return replace(
        work,
        mask=work.mask[rows] if work.mask is not None else None,
        positions=positions[rows] if positions is not None and positions.shape[0] > 1 else positions,
        dropout_seed=work.dropout_seed + number if work.dropout_seed is not None else None,
        prefix={block: (key[rows], value[rows]) for block, (key, value) in work.prefix.items()},
    )


async def _all(jobs: Iterable[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Do jobs at once, `_IN_FLIGHT` at most; the first failure cancels the others."""
    turn = asyncio.Semaphore(_IN_FLIGHT)

    async def run(job: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with turn:
            return await job()  # begun only now: a coroutine that is cancelled before its turn prints a warning

    return await settle([asyncio.create_task(run(job)) for job in jobs])
