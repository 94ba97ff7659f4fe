"""Training calls through the swarm: micro-batches in flight over all spans at once, each hop retried elsewhere."""

import asyncio
import itertools
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from client.retries import Retries
from client.routing import Hop
from client.swarm import Swarm
from client.work import Work, answered_hidden, call_with_adapter
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import PeerFailed, SwarmError, UnknownCall

T = TypeVar("T")
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Passed:
    """A hop that a micro-batch took forward: all that its backward needs, also on another peer."""

    hop: Hop
    hidden: torch.Tensor
    call_id: int


@dataclass(frozen=True)
class Trace:
    """The way of one micro-batch."""

    work: Work
    rows: slice
    hops: tuple[_Passed, ...]


async def run_forward(
    swarm: Swarm, work: Work, blocks: range, hidden: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, list[Trace]]:
    """Hidden states after `blocks`, (batch, tokens, hidden size), and the traces for `run_backward` when `keep`."""
    parts = _split(work, hidden, swarm.config.micro_batch_tokens)
    results = await _all(_forward_part(swarm, part, rows, blocks, hidden[rows], keep) for part, rows in parts)
    outputs = [output for output, _ in results]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), [trace for _, trace in results]


async def run_backward(swarm: Swarm, traces: list[Trace], grad: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """The gradient of the forward's input, and of adapters and prefix by name, summed over the micro-batches.

    Prefix gradients are those of the whole batch's rows.
    """
    results = await _all(_backward_part(swarm, trace, grad[trace.rows]) for trace in traces)
    if len(results) == 1:
        return results[0]
    total: Gradients = {}
    for name in results[0][1]:
        pieces = [gradients[name] for _, gradients in results if name in gradients]
        total[name] = torch.cat(pieces) if name.startswith("prefix.") else torch.stack(pieces).sum(0)
    return torch.cat([hidden for hidden, _ in results]), total


async def _forward_part(
    swarm: Swarm, work: Work, rows: slice, blocks: range, hidden: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, Trace]:
    passed = list[_Passed]()

    async def go(hop: Hop) -> None:
        nonlocal hidden
        output, call_id = await _forward_hop(swarm, work, hop, hidden, keep)
        passed.append(_Passed(hop, hidden, call_id))
        hidden = output

    await Retries(swarm).hop_by_hop(blocks.start, blocks.stop, "forward", go)
    return hidden, Trace(work, rows, tuple(passed) if keep else ())


async def _forward_hop(
    swarm: Swarm, work: Work, hop: Hop, hidden: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, int]:
    message = Message(pb.Forward(context=work.context(hop), keep=keep), work.tensors(hop, hidden))
    async with swarm.connections.channel(hop.peer.peer_id) as channel:
        answer = await call_with_adapter(swarm.puts, channel, message, work.bundle(hop))
    swarm.health.succeed(hop.peer.peer_id)
    call_id = answer.body.call_id if isinstance(answer.body, pb.Result) else 0
    return answered_hidden(answer, hidden, hop.peer.peer_id), call_id


async def _backward_part(swarm: Swarm, trace: Trace, grad: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    total: Gradients = {}
    for passed in reversed(trace.hops):
        grad, gradients = await _backward_hop(swarm, trace.work, passed, grad)
        total |= gradients
    return grad, total


async def _backward_hop(
    swarm: Swarm, work: Work, passed: _Passed, grad: torch.Tensor
) -> tuple[torch.Tensor, Gradients]:
    """From the activations that the peer kept; else from the inputs, on this peer or on any others."""
    hop, retries = passed.hop, Retries(swarm)
    if passed.call_id:
        try:
            return await _ask_backward(swarm, work, hop, {"grad": grad}, passed.call_id, grad)
        except UnknownCall:
            pass
        except SwarmError as error:
            retries.failed(hop.peer, error)
    while True:
        route = await retries.find_route(hop.start, hop.end, "forward")
        if len(route) > 1:
            return await _backward_over(swarm, work, passed, grad)
        try:
            tensors = {**work.tensors(route[0], passed.hidden), "grad": grad}
            return await _ask_backward(swarm, work, route[0], tensors, 0, grad)
        except SwarmError as error:
            retries.failed(route[0].peer, error)


async def _backward_over(
    swarm: Swarm, work: Work, passed: _Passed, grad: torch.Tensor
) -> tuple[torch.Tensor, Gradients]:
    """The blocks of one lost hop are now on several peers: go forward over them again, then back."""
    blocks = range(passed.hop.start, passed.hop.end)
    _, trace = await _forward_part(swarm, work, slice(None), blocks, passed.hidden, keep=True)
    return await _backward_part(swarm, trace, grad)


async def _ask_backward(
    swarm: Swarm, work: Work, hop: Hop, tensors: Mapping[str, torch.Tensor], call_id: int, grad: torch.Tensor
) -> tuple[torch.Tensor, Gradients]:
    message = Message(pb.Backward(context=work.context(hop), call_id=call_id), tensors)
    async with swarm.connections.channel(hop.peer.peer_id) as channel:
        answer = await call_with_adapter(swarm.puts, channel, message, work.bundle(hop))
    swarm.health.succeed(hop.peer.peer_id)
    gradients = {name.removeprefix("grad."): tensor for name, tensor in answer.tensors.items()}
    hidden = gradients.pop("hidden_states", None)
    if hidden is None or hidden.shape != grad.shape:
        raise PeerFailed(f"Peer {hop.peer.peer_id} answered a backward without the gradient of the hidden states.")
    _check_gradients(work, hop, gradients)
    return hidden.to(grad.device, grad.dtype), gradients


def _check_gradients(work: Work, hop: Hop, gradients: Gradients) -> None:
    """A step's gradients are complete, or it is repeated: nothing missing, nothing foreign, every shape right."""
    bundle = work.bundle(hop)
    expected: dict[str, torch.Size] = {}
    if bundle and work.adapters:
        blocks = range(hop.start, hop.end)
        for name in work.adapters.trainable:
            if int(name.partition(".")[0]) in blocks:
                expected[f"adapter.{name}"] = work.adapters.tensors[name].shape
    for block in range(hop.start, hop.end):
        if block in work.prefix:
            for part, tensor in zip(("key", "value"), work.prefix[block], strict=True):
                expected[f"prefix.{block}.{part}"] = tensor.shape
    for name, tensor in gradients.items():
        if name not in expected or tensor.shape != expected[name]:
            raise PeerFailed(f"Peer {hop.peer.peer_id} answered a backward with a wrong gradient {name!r}.")


def _split(work: Work, hidden: torch.Tensor, tokens: int) -> list[tuple[Work, slice]]:
    """Micro-batches by rows, of about `tokens` tokens, as even as can be."""
    batch, length = hidden.shape[:2]
    count = min(batch, -(-batch * length // tokens))
    if count == 1:
        return [(work, slice(0, batch))]
    borders = [batch * i // count for i in range(count + 1)]
    return [
        (_rows_of(work, slice(begin, end), number), slice(begin, end))
        for number, (begin, end) in enumerate(itertools.pairwise(borders))
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


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines at once; the first failure cancels the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
