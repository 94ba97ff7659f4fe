"""Asks peers: one request, with the adapters that it needs, and what its answer says of the peer."""

from collections.abc import Awaitable
from typing import Any

import torch

from client.adapters.bundle import AdapterBundle
from client.requests.handover import Boundary, link
from client.requests.puts import Puts
from client.requests.verify import Verifier
from client.requests.work import Codecs, Work, answered_hidden, result_of
from client.swarm.health import Asking
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message, OnWorking
from protocol.codecs import SUPPORTED, round_trip
from protocol.errors import PeerFailed, UnknownAdapter

Gradients = dict[str, torch.Tensor]
"""By name: `adapter.BLOCK.PATH`, `prefix.BLOCK.key`, `prefix.BLOCK.value`."""
_FEW = 64
"""Tokens of a training call that tells nothing of a peer's pace."""


class Caller:
    """Asks the peers of a swarm. One for a model and its copies."""

    def __init__(self, swarm: Swarm):
        self.swarm = swarm
        self.verifier = Verifier(swarm, swarm.config.verify)
        self._puts = Puts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Caller":
        return self

    def call(
        self,
        channel: Channel,
        message: Message,
        bundle: AdapterBundle | None,
        asking: Asking,
        on_working: OnWorking | None = None,
    ) -> Awaitable[Message]:
        """The answer to a request that needs the adapters `bundle`. Raises `SwarmError`.

        `asking` then has the seconds of the request alone, without those of sending adapters.
        """
        if bundle is None:
            return channel.call(message, on_working)
        return self._call_with_adapter(channel, message, bundle, asking, on_working)

    async def _call_with_adapter(
        self, channel: Channel, message: Message, bundle: AdapterBundle, asking: Asking, on_working: OnWorking | None
    ) -> Message:
        """The answer; when the peer does not hold the adapter, it is put and the peer asked again.

        An adapter that is being trained is new to every peer after each optimizer step, so it is put first.
        """
        if bundle.is_trained:
            await self._puts.put(channel, bundle, None)
        seen = self._puts.last_done(channel.remote, bundle.key)
        try:
            asking.restart()
            return await channel.call(message, on_working)
        except UnknownAdapter:
            await self._puts.put(channel, bundle, seen)
        asking.restart()
        return await channel.call(message, on_working)

    async def forward(
        self,
        work: Work,
        hop: Hop,
        hidden: torch.Tensor,
        keep: bool,
        before: Boundary | None = None,
        after: Boundary | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Hidden states after a hop, and the name of the activations that its peer kept (0: none). Raises `SwarmError`.

        `hidden`, (batch, tokens, hidden size), comes over the boundary `before`, if there is one: then it only tells
        the shape. So does the result, when it was pushed over the boundary `after`.
        """
        bundle = work.bundle(hop)
        body = pb.Forward(context=work.context(hop, bundle), keep=keep, hand_over=link(before, after, copy=False))
        message = Message(body, work.tensors(hop, None if before else hidden), work.codecs.of_request)
        answer, result, seconds = await self._ask(hop, message, bundle, before)
        if seconds is not None and not before and (tokens := hidden.shape[0] * hidden.shape[1]) > _FEW:
            self.swarm.health.took(hop, tokens, seconds)
        if after and result.pushed:
            await after.passed(None, pushed=True)
            return hidden, result.call_id
        output = answered_hidden(answer, hidden, hop.peer.peer_id)
        if after:
            await after.passed(output, pushed=False)
        return output, result.call_id

    async def backward(
        self,
        work: Work,
        hop: Hop,
        hidden: torch.Tensor,
        grad: torch.Tensor,
        call_id: int,
        before: Boundary | None = None,
        after: Boundary | None = None,
    ) -> tuple[torch.Tensor, Gradients]:
        """The gradient of a hop's input, and of its adapters and prefixes by name, from the gradient of its output.

        From the activations kept as `call_id`; when that is 0, from the hop's input `hidden`. For `before` and `after`
        see `forward`. Raises `SwarmError`.
        """
        tensors = {} if before else {"grad": grad}
        if not call_id:
            tensors |= work.tensors(hop, hidden)
        bundle = work.bundle(hop)
        context = work.context(hop, bundle, is_backward=True)
        body = pb.Backward(context=context, call_id=call_id, hand_over=link(before, after, copy=False))
        message = Message(body, tensors, work.codecs.of_request)
        answer, result, _ = await self._ask(hop, message, bundle, before)
        gradients = {name.removeprefix("grad."): tensor for name, tensor in answer.tensors.items()}
        found = gradients.pop("hidden_states", None)
        _check_gradients(work, hop, gradients)
        if after and result.pushed:
            await after.passed(None, pushed=True)
            return grad, gradients
        if found is None or found.shape != grad.shape:
            raise PeerFailed(f"Peer {hop.peer.peer_id} answered a backward without the gradient of the hidden states.")
        found = found.to(grad.dtype)
        if after:
            await after.passed(found, pushed=False)
        return found, gradients

    def received(
        self, work: Work, hop: Hop, hidden: torch.Tensor, grad: torch.Tensor | None = None
    ) -> tuple[Codecs, list[torch.Tensor]]:
        """The codecs used with a hop's peer, and the hidden states and their gradient as it received them.

        Others are given these, uncoded, to compute its answer again.
        """
        codecs = work.codecs.among(self.swarm.connections.codecs.get(hop.peer.peer_id, SUPPORTED))
        got = [round_trip(hidden, codecs.out)]
        return codecs, got if grad is None else [*got, round_trip(grad, codecs.gradients)]

    async def _ask(
        self, hop: Hop, message: Message, bundle: AdapterBundle | None, before: Boundary | None
    ) -> tuple[Message, pb.Result, float | None]:
        """A peer's answer, its body, and the seconds that it took; see `Asking.seconds`."""
        peer_id, health = hop.peer.peer_id, self.swarm.health
        async with self.swarm.connections.channel(peer_id) as channel:
            with health.asking(peer_id) as asking:
                answer = await self.call(channel, message, bundle, asking, before.on_working if before else None)
        health.succeed(peer_id)
        return answer, result_of(answer), asking.seconds


def _check_gradients(work: Work, hop: Hop, gradients: Gradients) -> None:
    """Raise `PeerFailed` for a gradient that is foreign or of a wrong shape, and when one of a prefix is missing.

    Some of an adapter's may be missing: those of what takes no part, such as modules that PEFT's methods leave out at
    random.
    """
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
