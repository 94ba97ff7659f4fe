"""The streams of all clients: each request goes to the handler of its kind, and its answer back.

Nothing is kept of a client beyond what can be made again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

from google.protobuf.message import Message as ProtoMessage

from peer.compute.batch_counts import BatchCounts
from peer.compute.scheduler import Priority, Scheduler
from peer.kv_cache.memory import CacheMemory
from peer.service.adapters import Adapters
from peer.service.base_weights import BaseWeights
from peer.service.connection import Connection
from peer.service.generation import Generation
from peer.service.handover import HandOver
from peer.service.reception import Reception
from peer.service.training import Training
from peer.span.checks import prefix_length
from peer.span.failures import is_of_the_device, is_out_of_memory
from peer.span.span import Span
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import BadRequest, Draining, NotAMember, OutOfMemory, PeerFailed, SwarmError, TooLong, first_line
from protocol.membership.certificate import Role
from protocol.membership.handshake import require
from protocol.model.anatomy import context_length
from protocol.records import Trainable

logger = logging.getLogger(__name__)

_LIVELY = 3.0
"""Seconds after its last step in which a session's next one is likely to come."""


class _Handler(NamedTuple):
    """Who answers a kind of request."""

    answer: Callable[[Connection, Message, Any], Awaitable[Message]]
    while_draining: bool = False
    """Whether that is still done when the peer is about to leave."""
    is_repeated: bool = False
    """Whether it is done once more if there was no memory, when kept training calls have given way."""
    role: Role = Role.USE
    """The least that a member of a private swarm must have."""


class Service:
    """Answers clients' requests on one span."""

    def __init__(
        self,
        reception: Reception,
        scheduler: Scheduler,
        generation: Generation,
        training: Training,
        adapters: Adapters,
        base_weights: BaseWeights,
        hand_over: HandOver,
        span: Span,
    ):
        self._reception, self._scheduler, self._span = reception, scheduler, span
        self._generation, self._training, self._adapters, self._hand_over = generation, training, adapters, hand_over
        self._handlers: dict[type[ProtoMessage], _Handler] = {
            pb.Ping: _Handler(_pong, while_draining=True),
            pb.Step: _Handler(generation.step, while_draining=True),
            pb.OpenSession: _Handler(generation.open),
            pb.ForkSession: _Handler(generation.fork, is_repeated=True),
            pb.Forward: _Handler(training.forward),
            pb.Backward: _Handler(training.backward, while_draining=True),
            pb.PutAdapter: _Handler(adapters.put, is_repeated=True),
            pb.ReadWeight: _Handler(base_weights.read, is_repeated=True),
            pb.Factorize: _Handler(base_weights.factorize, is_repeated=True),
        }
        self.requests = 0
        """Being answered."""
        self.device_lost = asyncio.Event()
        """Set when the span's device has failed for good: nothing can be computed any more."""
        self._is_draining = False

    @property
    def memory(self) -> CacheMemory:
        """That of the sessions' KV caches."""
        return self._generation.memory

    @property
    def kept_bytes(self) -> int:
        """Of what forwards left for their backwards."""
        return self._training.runner.kept_bytes

    @property
    def adapter_bytes(self) -> int:
        """Of clients' adapters, what PEFT computed of their configurations included."""
        return self._adapters.store.size

    @property
    def step_counts(self) -> BatchCounts:
        """Of the steps that were run."""
        return self._generation.steps.counts

    @property
    def training_counts(self) -> BatchCounts:
        """Of the training calls that were run."""
        return self._training.runner.counts

    @property
    def trainable(self) -> Trainable | None:
        """What one more client can train."""
        return self._training.runner.trainable

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, or a session was in use a moment ago and is likely to go on."""
        return bool(self.requests) or self.memory.is_in_use(_LIVELY)

    def drain(self) -> None:
        """From now on take no new work, and tell clients to take their sessions elsewhere."""
        self._is_draining = self._generation.is_leaving = True

    async def serve(self, channel: Channel, first: Message) -> None:
        """Serve one stream, whose first request is `first`, until its client closes it."""
        client = channel.remote
        try:
            connection = Connection(channel, await self._reception.admit(channel, first), self._scheduler)
        except SwarmError as error:
            logger.debug("stream of %s refused: %s", client, error)
            return
        try:
            while True:
                await self._serve_one(connection)
        except SwarmError as error:  # the stream is over: broken, or not to be trusted any more
            logger.debug("stream of %s ended: %s", client, error)
        finally:
            self._generation.end(connection)
            if self._reception.accounts.leave(client):
                self._scheduler.submit(Priority.CALL, partial(self._training.runner.forget, client), client)
                asyncio.get_running_loop().call_later(self.memory.idle_timeout, self._forget_adapters, client)

    async def _serve_one(self, connection: Connection) -> None:
        """Answer one request. What is wrong with it is the answer; what breaks the stream is raised."""
        channel = connection.channel
        try:
            message = await channel.receive_request()
        except (BadRequest, NotAMember) as error:  # no frame, or a stream that is not to go on
            await channel.fail(error)
            raise
        if isinstance(message.body, pb.Push):
            return self._hand_over.take_push(connection, message, message.body)
        self.requests += 1
        try:
            with connection.account.request(message.cost):
                handler = self._find_handler(message.body)
                require(channel, handler.role)
                answer = await self._answer(handler, connection, message)
        except SwarmError as error:
            await channel.fail(error)
        except Exception as error:
            typed = self._typed_error(error, connection, message)
            if isinstance(typed, PeerFailed):
                logger.exception("a request of %s failed", channel.remote)
            else:
                logger.warning("a request of %s was refused: %s", channel.remote, first_line(error))
            if is_of_the_device(error):
                self._scheduler.submit(Priority.STEP, self._span.computes).add_done_callback(self._learn_of_device)
            await channel.fail(typed)
        else:
            await _send(channel, answer)
        finally:
            self.requests -= 1

    async def _answer(self, handler: _Handler, connection: Connection, message: Message) -> Message:
        try:
            return await handler.answer(connection, message, message.body)
        except Exception as error:
            if not handler.is_repeated or not is_out_of_memory(error):
                raise
        await connection.compute(Priority.CALL, self._training.runner.give_way)
        return await handler.answer(connection, message, message.body)

    def _learn_of_device(self, computes: "asyncio.Future[bool]") -> None:
        if not computes.cancelled() and not computes.result():
            self.device_lost.set()

    def _find_handler(self, body: ProtoMessage) -> _Handler:
        handler = self._handlers.get(type(body))
        if self._is_draining and not (handler and handler.while_draining):
            raise Draining("This peer is leaving the swarm and takes no new work.")
        if handler is None:
            raise BadRequest(f"A peer does not answer {type(body).__name__} messages.")
        return handler

    def _typed_error(self, error: Exception, connection: Connection, message: Message) -> SwarmError:
        """The typed error for a failure of torch's own, or of a block's code."""
        if is_out_of_memory(error):
            return OutOfMemory("The call did not fit this peer's memory; send fewer tokens at once.")
        limit = None if is_of_the_device(error) else context_length(self._span.config)
        if limit is not None and _length(connection, message) > limit:
            # MPT and GPT-J make tables of so many positions; every peer fails, and none deserves to be kept away from.
            return TooLong(f"The blocks of this model cannot compute more than {limit} tokens; shorten the prompt.")
        return PeerFailed(f"{type(error).__name__}: {str(error)[:300]}")

    def _forget_adapters(self, client: str) -> None:
        """Unless the client has come back. On its own queue: before anything that it may put after this."""
        if client not in self._reception.accounts:
            self._scheduler.submit(Priority.CALL, partial(self._adapters.store.forget, client), client)


async def _pong(connection: Connection, message: Message, body: pb.Ping) -> Message:
    return Message(pb.Result())


async def _send(channel: Channel, answer: Message) -> None:
    """An answer over the limits is refused before any of it is written: the stream is whole, and can say so."""
    try:
        await channel.send(answer)
    except BadRequest as error:
        await channel.fail(error)


def _length(connection: Connection, message: Message) -> int:
    """Tokens that a request was about, those in the cache of its session included."""
    hidden = message.tensors.get("hidden_states")
    past = connection.session.cache.seen if isinstance(message.body, pb.Step) and connection.session else 0
    own = hidden.shape[1] if hidden is not None and hidden.ndim == 3 else 0
    return past + own + prefix_length(message.tensors)
