"""One hop of a training call: asked, its answer checked, and by chance computed again by others."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from client.requests.handover import Border, link
from client.requests.puts import call_with_adapter
from client.requests.verify import Answer, Recompute
from client.requests.work import Codecs, Work, answered_hidden
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.codecs import SUPPORTED, round_trip
from protocol.errors import PeerFailed, SwarmError

Gradients = dict[str, torch.Tensor]
_FEW = 64
"""Tokens of a call that tells nothing of a peer's pace."""


async def forward_hop(swarm: Swarm, work: Work, hop: Hop, hidden: torch.Tensor, keep: bool) -> tuple[torch.Tensor, int]:
    """Hidden states after a hop, and the name of the activations that its peer kept (0: none). Raises `SwarmError`."""
    output, call_id = await ask_forward(swarm, work, hop, hidden, keep)
    if swarm.verifier.is_due(work):
        codecs, (got,) = as_received(swarm, work, hop, hidden)
        answer = Answer(hop, "forward", {"hidden_states": output}, {"hidden_states": got}, codecs.back)
        await swarm.verifier.check(answer, recompute_forward(swarm, work, hop, got))
    return output, call_id


async def backward_hop(
    swarm: Swarm, work: Work, hop: Hop, hidden: torch.Tensor, grad: torch.Tensor, call_id: int
) -> tuple[torch.Tensor, Gradients]:
    """The gradient of a hop's input, and of its adapters and prefixes by name, from the gradient of its output.

    From the activations kept as `call_id`; when that is 0, from the hop's input `hidden`. Raises `SwarmError`.
    """
    found, gradients = await ask_backward(swarm, work, hop, hidden, grad, call_id)
    if swarm.verifier.is_due(work):
        codecs, (got, grad) = as_received(swarm, work, hop, hidden, grad)
        tensors = {"hidden_states": found, **gradients}
        answer = Answer(hop, "backward", tensors, {"hidden_states": grad}, codecs.gradients)
        await swarm.verifier.check(answer, _recompute_backward(swarm, work, hop, got, grad))
    return found, gradients


def as_received(
    swarm: Swarm, work: Work, hop: Hop, hidden: torch.Tensor, grad: torch.Tensor | None = None
) -> tuple[Codecs, list[torch.Tensor]]:
    """The codecs used with a hop's peer, and what it got of the hidden states and their gradient: what others are
    given, uncoded, to compute its answer again."""
    codecs = work.codecs.among(swarm.connections.codecs.get(hop.peer.peer_id, SUPPORTED))
    got = [round_trip(hidden, codecs.out)]
    return codecs, got if grad is None else [*got, round_trip(grad, codecs.gradients)]


def recompute_forward(swarm: Swarm, work: Work, hop: Hop, hidden: torch.Tensor, tokens: int | None = None) -> Recompute:
    """Computes a hop's forward again, on other peers; of its result the last `tokens` tokens (None: all)."""
    work = replace(work, codecs=Codecs())

    async def recompute(without: Collection[str]) -> tuple[Mapping[str, torch.Tensor], list[Hop]]:
        flow, route = hidden, await swarm.find_route(hop.start, hop.end, "forward", without)
        for other in route:
            with _blaming(swarm, other):
                flow, _ = await ask_forward(swarm, work, other, flow, keep=False)
        return {"hidden_states": flow if tokens is None else flow[:, -tokens:]}, route

    return recompute


def _recompute_backward(swarm: Swarm, work: Work, hop: Hop, hidden: torch.Tensor, grad: torch.Tensor) -> Recompute:
    work = replace(work, codecs=Codecs())

    async def recompute(without: Collection[str]) -> tuple[Mapping[str, torch.Tensor], list[Hop]]:
        flow, inputs, route = hidden, [], await swarm.find_route(hop.start, hop.end, "forward", without)
        for other in route:
            inputs.append(flow)
            if other is not route[-1]:
                with _blaming(swarm, other):
                    flow, _ = await ask_forward(swarm, work, other, flow, keep=False)
        back, total = grad, Gradients()
        for other, before in zip(reversed(route), reversed(inputs), strict=True):
            with _blaming(swarm, other):
                back, gradients = await ask_backward(swarm, work, other, before, back, 0)
            total |= gradients
        return {"hidden_states": back, **total}, route

    return recompute


@contextmanager
def _blaming(swarm: Swarm, hop: Hop) -> Iterator[None]:
    try:
        yield
    except SwarmError as error:
        swarm.blame(hop.peer, error)
        raise


async def ask_forward(
    swarm: Swarm,
    work: Work,
    hop: Hop,
    hidden: torch.Tensor,
    keep: bool,
    before: Border | None = None,
    after: Border | None = None,
) -> tuple[torch.Tensor, int]:
    """As `forward_hop`, unverified.

    `hidden` comes over the border `before`, if there is one: then it only tells the shape. So does the result, when it
    was pushed over the border `after`.
    """
    body = pb.Forward(context=work.context(hop), keep=keep, hand_over=link(before, after, copy=False))
    message = Message(body, work.tensors(hop, None if before else hidden), work.codecs.of_request)
    answer, result, seconds = await _ask(swarm, work, hop, message, before)
    if seconds is not None and not before and (tokens := hidden.shape[0] * hidden.shape[1]) > _FEW:
        swarm.health.took(hop, tokens, seconds)
    if after and result.pushed:
        await after.passed(None, pushed=True)
        return hidden, result.call_id
    output = answered_hidden(answer, hidden, hop.peer.peer_id)
    if after:
        await after.passed(output, pushed=False)
    return output, result.call_id


async def ask_backward(
    swarm: Swarm,
    work: Work,
    hop: Hop,
    hidden: torch.Tensor,
    grad: torch.Tensor,
    call_id: int,
    before: Border | None = None,
    after: Border | None = None,
) -> tuple[torch.Tensor, Gradients]:
    """As `backward_hop`, unverified; for `before` and `after` see `ask_forward`."""
    tensors = {} if before else {"grad": grad}
    if not call_id:
        tensors |= work.tensors(hop, hidden)
    body = pb.Backward(
        context=work.context(hop, is_backward=True), call_id=call_id, hand_over=link(before, after, copy=False)
    )
    message = Message(body, tensors, work.codecs.of_request)
    answer, result, _ = await _ask(swarm, work, hop, message, before)
    gradients = {name.removeprefix("grad."): tensor for name, tensor in answer.tensors.items()}
    found = gradients.pop("hidden_states", None)
    _check_gradients(work, hop, gradients)
    if after and result.pushed:
        await after.passed(None, pushed=True)
        return grad, gradients
    if found is None or found.shape != grad.shape:
        raise PeerFailed(f"Peer {hop.peer.peer_id} answered a backward without the gradient of the hidden states.")
    found = found.to(grad.device, grad.dtype)
    if after:
        await after.passed(found, pushed=False)
    return found, gradients


async def _ask(
    swarm: Swarm, work: Work, hop: Hop, message: Message, before: Border | None
) -> tuple[Message, pb.Result, float | None]:
    """The answer to a request, its body, and the seconds it took: None when other requests of ours overlapped it."""
    on_working = before.on_working if before else None
    async with swarm.connections.channel(hop.peer.peer_id) as channel:
        with swarm.health.asking(hop.peer.peer_id) as asking:
            answer, seconds = await call_with_adapter(swarm.puts, channel, message, work.bundle(hop), on_working)
    swarm.health.succeed(hop.peer.peer_id)
    result = answer.body if isinstance(answer.body, pb.Result) else pb.Result()
    return answer, result, seconds if asking.alone else None


def _check_gradients(work: Work, hop: Hop, gradients: Gradients) -> None:
    """A step's gradients are right, or it is repeated: nothing foreign, every shape right, every prefix there. Some of
    an adapter's may be missing: of what takes no part, such as modules that PEFT's methods leave out at random."""
    expected: dict[str, torch.Size] = {}
    if work.adapters:
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
    if missing := {name for name in expected if name.startswith("prefix.")} - gradients.keys():
        raise PeerFailed(f"Peer {hop.peer.peer_id} answered a backward without the gradient {min(missing)!r}.")
