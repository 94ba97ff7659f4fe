"""The handlers: check what came, queue it, answer. Stateless about clients beyond what can be made again."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from peer.adapters.store import AdapterStore, Bundle
from peer.base_weights.factors import check_factorize, factorize
from peer.base_weights.norms import read_norm
from peer.compute.scheduler import Priority, Scheduler
from peer.compute.tally import Tally
from peer.generation.steps import Step, StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from peer.service.handover import Mailbox, Outbox, Request
from peer.service.quotas import Account
from peer.service.reception import Reception
from peer.span.checks import (
    check_inputs,
    check_mode,
    check_prefix,
    prefix_length,
)
from peer.span.span import Mode, Span
from peer.training.runner import Task, TrainingRunner
from peer.training.trainer import TrainingCall
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import (
    BadRequest,
    Draining,
    OutOfMemory,
    PeerFailed,
    SessionLost,
    SwarmError,
)
from protocol.stream import Stream
from protocol.tensors import torch_dtype

logger = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEAT = 2.0
"""Seconds between the signs of life that a client gets while its answer is computed."""
_LIVELY = 3.0
"""Seconds after its last step in which a session's next one is likely to come."""
_MAX_NAMES = 4096
_MAX_ANSWER = 2**20
"""Bytes of a step's answer that are kept for a repetition: no quota counts them."""


@dataclass
class _Connection:
    """One stream from one client, and the session that lives on it."""

    channel: Channel
    account: Account
    session: Session | None = None
    mode: Mode | None = None
    forks: list[bytes] = field(default_factory=list)
    """Tokens of the session's copies; those that nobody opened end with this stream."""

    @property
    def client(self) -> str:
        """The client's peer ID."""
        return self.channel.remote


@dataclass
class Load:
    """How busy the service is."""

    sessions: int = 0
    calls: int = 0


class Service:
    """Answers clients' requests on one span."""

    def __init__(
        self,
        reception: Reception,
        span: Span,
        memory: CacheMemory,
        adapters: AdapterStore,
        calls: TrainingRunner,
        steps: StepRunner,
        scheduler: Scheduler,
        mailbox: Mailbox,
        outbox: Outbox,
    ):
        self._reception, self._span, self.memory = reception, span, memory
        self._adapters, self._calls, self._scheduler = adapters, calls, scheduler
        self._steps = steps
        self._mailbox, self._outbox = mailbox, outbox
        self._forks: dict[bytes, tuple[str, Session, Mode]] = {}
        """Token -> client, session, mode."""
        self.load = Load()
        self.draining = False

    @property
    def is_busy(self) -> bool:
        """Whether a call is being answered, or a session was in use a moment ago and is likely to go on."""
        return bool(self.load.calls) or self.memory.is_in_use(_LIVELY)

    @property
    def tally(self) -> Tally:
        """Of the steps that were run."""
        return self._steps.tally

    @property
    def call_tally(self) -> Tally:
        """Of the training calls that were run."""
        return self._calls.tally

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until its client closes it."""
        channel, client = self._reception.open(stream), stream.remote
        try:
            connection = _Connection(channel, await self._reception.admit(channel))
        except SwarmError as error:
            logger.debug("stream of %s refused: %s", client, error)
            return
        try:
            while True:
                await self._serve_one(connection)
        except SwarmError as error:  # the stream is over: broken, or not to be trusted any more
            logger.debug("stream of %s ended: %s", client, error)
        finally:
            self._end_session(connection)
            if self._reception.accounts.leave(client):
                self._scheduler.submit(Priority.CALL, partial(self._calls.forget, client), client)
                asyncio.get_running_loop().call_later(self.memory.idle_timeout, self._forget_adapters, client)

    async def _serve_one(self, connection: _Connection) -> None:
        """Answer one request. What is wrong with it is the answer; what breaks the stream is raised."""
        channel = connection.channel
        try:
            message = await channel.receive_request()
            self._reception.check_current(channel)
        except (BadRequest, PeerFailed) as error:  # no frame, or a stream that is not to go on
            await channel.fail(error)
            raise
        if isinstance(message.body, pb.Push):
            return self._take_push(connection, message, message.body)
        self.load.calls += 1
        try:
            with connection.account.call(message.cost):
                answer = await self._answer(connection, message)
        except torch.OutOfMemoryError as error:
            await channel.fail(OutOfMemory(f"The call did not fit this peer's memory: {error}"))
        except SwarmError as error:
            await channel.fail(error)
        except Exception as error:
            logger.exception("a call of %s failed", channel.remote)
            await channel.fail(_told(error))
        else:
            await _reply(channel, answer)
        finally:
            self.load.calls -= 1

    async def _answer(self, connection: _Connection, message: Message) -> Message:
        body = message.body
        if isinstance(body, pb.Step):
            return await self._step(connection, message, body)
        if isinstance(body, pb.Backward):
            return await self._backward(connection, message, body)
        if isinstance(body, pb.Ping):
            return Message(pb.Result())
        if self.draining:
            raise Draining("This peer is leaving the swarm and takes no new work.")
        if isinstance(body, pb.Forward):
            return await self._forward(connection, message, body)
        if isinstance(body, pb.OpenSession):
            return self._open_session(connection, body)
        if isinstance(body, pb.ForkSession):
            return await self._fork_session(connection)
        if isinstance(body, pb.PutAdapter):
            return await self._put_adapter(connection, message, body)
        if isinstance(body, pb.ReadWeight):
            return await self._read_weight(connection, body)
        if isinstance(body, pb.Factorize):
            return await self._factorize(connection, message, body)
        raise BadRequest(f"A peer does not answer {type(body).__name__} messages.")

    # ---- generation

    def _open_session(self, connection: _Connection, body: pb.OpenSession) -> Message:
        mode = check_mode(self._span, pb.Context(start=body.start, end=body.end))
        self._end_session(connection)
        if body.fork_of:
            owner, session, blocks = self._forks.get(body.fork_of, ("", None, mode))
            if session is None or owner != connection.client:
                raise BadRequest("There is no such forked session here.")
            del self._forks[body.fork_of]
            connection.session, connection.mode = session, blocks
            return Message(pb.Result())
        connection.account.open_session()
        cache = SpanCache(self._span.model.config, mode.blocks)
        connection.session, connection.mode = Session(connection.account, cache), mode
        self._begin(connection.session)
        return Message(pb.Result())

    async def _fork_session(self, connection: _Connection) -> Message:
        session, mode = self._session(connection)
        connection.account.open_session()
        twin = session.twin()
        try:
            await self._compute(connection, Priority.STEP, partial(session.copy_to, twin))
        except BaseException:
            twin.close()
            connection.account.close_session()
            raise
        self._begin(twin)
        token = secrets.token_bytes(16)
        self._forks[token] = (connection.client, twin, mode)
        connection.forks.append(token)
        return Message(pb.Result(token=token))

    def _begin(self, session: Session) -> None:
        self.memory.watch(session)
        self.load.sessions += 1

    def _end(self, session: Session, account: Account) -> None:
        session.close()
        self.memory.forget(session)
        account.close_session()
        self.load.sessions -= 1

    async def _step(self, connection: _Connection, message: Message, body: pb.Step) -> Message:
        session, mode = self._session(connection)
        if body.number == session.number > 0:
            if session.answer is None:
                raise SessionLost("The answer to this step was too large to be kept; send the session's tokens again.")
            return await self._stepped(connection, body, session.answer)
        if body.number != session.number + 1:
            raise BadRequest(f"Step {body.number} follows step {session.number}; expected {session.number + 1}.")
        wanted = check_mode(self._span, body.context)
        if wanted.blocks != mode.blocks:
            raise BadRequest("A session's blocks cannot change between its steps.")
        bundle = self._bundle(connection, body.context)
        with session.in_use():
            message = await self._completed(connection, message, body.hand_over)
            step = Step(session, message, body, wanted, bundle)
            hidden = await self._answered(connection, self._submit_step(step, connection.client))
        session.number, session.answer = body.number, hidden if hidden.nbytes <= _MAX_ANSWER else None
        return await self._stepped(connection, body, hidden)

    def _submit_step(self, step: Step, client: str) -> "asyncio.Future[torch.Tensor]":
        group = self._steps.group(step)
        return self._scheduler.submit_joint(Priority.STEP, self._steps.run, step, client, group, step.size)

    async def _stepped(self, connection: _Connection, body: pb.Step, hidden: torch.Tensor) -> Message:
        result = pb.Result(leaving=self.draining)
        return await self._handed_over(connection, body, result, {"hidden_states": hidden})

    def _session(self, connection: _Connection) -> tuple[Session, Mode]:
        if connection.session is None or connection.mode is None:
            raise BadRequest("No session is open on this stream; open one first.")
        if connection.session.lost:
            raise SessionLost("This session lay idle and its memory went to others; send its tokens again.")
        return connection.session, connection.mode

    def _end_session(self, connection: _Connection) -> None:
        if connection.session is not None:
            self._end(connection.session, connection.account)
            connection.session = None
        for token in connection.forks:
            if token in self._forks:
                self._end(self._forks.pop(token)[1], connection.account)
        connection.forks.clear()

    # ---- training

    async def _forward(self, connection: _Connection, message: Message, body: pb.Forward) -> Message:
        self._bundle(connection, body.context)  # whether it is there, before others' work is waited for
        message = await self._completed(connection, message, body.hand_over)
        call = self._call(connection, message, body.context)
        task = self._calls.forward(call, connection.client, body.keep)
        hidden, call_id = await self._called(connection, task)
        return await self._handed_over(connection, body, pb.Result(call_id=call_id), {"hidden_states": hidden})

    async def _backward(self, connection: _Connection, message: Message, body: pb.Backward) -> Message:
        message = await self._completed(connection, message, body.hand_over)
        grad = message.tensor("grad")
        if not grad.is_floating_point() or grad.ndim != 3 or grad.shape[2] != self._span.hidden_size:
            raise BadRequest(f"grad is {grad.dtype} {list(grad.shape)}; expected the shape of the forward's result.")
        if body.call_id:
            task = self._calls.backward_kept(body.call_id, connection.client, grad)
        else:
            call = self._call(connection, message, body.context)
            if call.inputs.hidden.shape != grad.shape:
                raise BadRequest("grad and hidden_states differ in shape.")
            task = self._calls.backward(call, grad)
        gradients = await self._called(connection, task)
        return await self._handed_over(connection, body, pb.Result(), gradients, "grad.hidden_states")

    async def _called(self, connection: _Connection, task: Task) -> Any:
        """The result of a training call."""
        run, client = self._calls.run, connection.client
        future = self._scheduler.submit_joint(Priority.CALL, run, task, client, task.group, max(1, task.size))
        return await self._answered(connection, future)

    def _call(self, connection: _Connection, message: Message, context: pb.Context) -> TrainingCall:
        mode = check_mode(self._span, context)
        past = prefix_length(message.tensors)
        inputs = check_inputs(self._span, message, past, self.memory.max_length)
        prefix = check_prefix(self._span, mode, message, inputs.hidden.shape[0])
        return TrainingCall(inputs, mode, self._bundle(connection, context), prefix)

    # ---- hand-over

    def _take_push(self, connection: _Connection, message: Message, body: pb.Push) -> None:
        """Nobody waits for an answer: it would be taken for that to the next request. Who misses the push will ask."""
        try:
            with connection.account.call(message.cost):
                self._mailbox.put(body.token, message.tensors)
        except SwarmError as error:
            logger.debug("a push of %s was dropped: %s", connection.client, error)

    async def _handed_over(
        self,
        connection: _Connection,
        body: Request,
        result: pb.Result,
        tensors: dict[str, torch.Tensor],
        name: str = "hidden_states",
    ) -> Message:
        """See `Outbox.answer`. The next peer may hang, and this one is not to look as if it did."""
        answer = self._outbox.answer(body, result, tensors, name)
        if not body.hand_over.to:
            return await answer  # a step of a generation: not worth a task
        return await self._answered(connection, asyncio.ensure_future(answer))

    async def _completed(self, connection: _Connection, message: Message, hand_over: pb.HandOver) -> Message:
        """A request with the tensor that comes from another peer, once it is here."""
        if not hand_over.awaits:
            return message
        waiting = asyncio.ensure_future(self._mailbox.take(hand_over.awaits))
        pushed = await self._answered(connection, waiting, pb.Working(waiting=True))
        return Message(message.body, {**message.tensors, **pushed})

    # ---- adapters

    async def _put_adapter(self, connection: _Connection, message: Message, body: pb.PutAdapter) -> Message:
        work = partial(self._adapters.put, body.manifest, message.tensors, connection.client)
        return Message(pb.Result(token=await self._compute(connection, Priority.CALL, work)))

    def _forget_adapters(self, client: str) -> None:
        """Unless the client has come back. On its own queue: before anything that it may put after this."""
        if client not in self._reception.accounts:
            self._scheduler.submit(Priority.CALL, partial(self._adapters.forget, client), client)

    def _bundle(self, connection: _Connection, context: pb.Context) -> Bundle | None:
        return self._adapters.get(context.adapter, connection.client) if context.adapter else None

    async def _read_weight(self, connection: _Connection, body: pb.ReadWeight) -> Message:
        dtype = torch_dtype(body.dtype)
        if dtype is None or not dtype.is_floating_point or len(body.names) > _MAX_NAMES:
            raise BadRequest(f"ReadWeight needs a floating dtype and at most {_MAX_NAMES} names.")
        dims = tuple(body.norm_dims)

        def read() -> dict[str, torch.Tensor]:
            norms = (read_norm(self._span, name, body.transposed, dims, dtype) for name in body.names)
            return {f"value.{i}": norm for i, norm in enumerate(norms)}

        return Message(pb.Result(), await self._compute(connection, Priority.CALL, read))

    async def _factorize(self, connection: _Connection, message: Message, body: pb.Factorize) -> Message:
        job = check_factorize(self._span, body, message.tensors)
        return Message(pb.Result(), await self._compute(connection, Priority.CALL, partial(factorize, job)))

    # ---- the compute thread

    async def _compute(self, connection: _Connection, priority: Priority, work: Callable[[], T]) -> T:
        """The result of `work`, run on the compute thread."""
        return await self._answered(connection, self._scheduler.submit(priority, work, connection.client))

    @staticmethod
    async def _answered(connection: _Connection, future: "asyncio.Future[T]", sign: pb.Working | None = None) -> T:
        """The result of something that takes a while. Meanwhile the client gets signs of life."""
        try:
            while True:
                done, _ = await asyncio.wait({future}, timeout=HEARTBEAT)
                if done:
                    return future.result()
                await connection.channel.send(Message(sign or pb.Working()))
        except BaseException:
            future.cancel()
            raise


async def _reply(channel: Channel, answer: Message) -> None:
    """An answer over the limits is refused before any of it is written: the stream is whole, and can say so."""
    try:
        await channel.send(answer)
    except BadRequest as error:
        await channel.fail(error)


def _told(error: Exception) -> SwarmError:
    """The typed error for a failure of torch's own."""
    text = str(error)
    if "can't allocate memory" in text or isinstance(error, MemoryError):
        return OutOfMemory("The call did not fit this peer's memory; send fewer tokens at once.")
    return PeerFailed(f"{type(error).__name__}: {text[:300]}")
