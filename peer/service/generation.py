"""The messages of a generation: OpenSession, ForkSession and Step."""

import secrets
from dataclasses import replace
from functools import partial

import torch

from peer.adapters.store import StoredAdapter
from peer.compute.scheduler import Priority
from peer.generation.steps import Step, StepRunner
from peer.kv_cache.edits import read_edits, tokens_after
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from peer.service.adapters import Adapters
from peer.service.connection import Connection
from peer.service.handover import HandOver
from peer.service.quotas import Account
from peer.span.checks import check_inputs, check_mode, check_prefix, prefix_length
from peer.span.span import Mode, Span
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import BadRequest, SessionLost

_MAX_ANSWER = 2**20
"""Bytes of a step's answer that are kept for a repetition: no quota counts them."""


class Generation:
    """Opens, copies and ends sessions, and has their steps run."""

    def __init__(self, span: Span, memory: CacheMemory, adapters: Adapters, steps: StepRunner, hand_over: HandOver):
        self.memory, self.steps = memory, steps
        self._span, self._adapters, self._hand_over = span, adapters, hand_over
        self._forks: dict[bytes, Session] = {}
        """Token -> a copy that no stream has opened yet."""
        self.is_leaving = False
        """Whether clients are told to take their sessions elsewhere."""

    async def open(self, connection: Connection, message: Message, body: pb.OpenSession) -> Message:
        """Open an empty session on the stream, or a copy. The stream's session so far ends."""
        blocks = check_mode(self._span, pb.Context(start=body.start, end=body.end)).blocks
        self.end(connection)
        if body.fork_of:
            fork = self._forks.get(body.fork_of)
            if fork is None or fork.owner != connection.client:
                raise BadRequest("There is no such forked session here.")
            connection.session = self._forks.pop(body.fork_of)
        else:
            connection.account.open_session()
            cache = SpanCache(self._span.config, blocks)
            connection.session = Session(self.memory, cache, connection.client)
            self.memory.watch(connection.session)
        return Message(pb.Result())

    async def fork(self, connection: Connection, message: Message, body: pb.ForkSession) -> Message:
        """Copy the stream's session. The answer has the token under which the client may open the copy."""
        session = _session_of(connection)
        connection.account.open_session()
        twin = session.twin()
        try:
            await connection.compute(Priority.STEP, partial(session.copy_to, twin))
        except BaseException:
            twin.close()
            connection.account.close_session()
            raise
        self.memory.watch(twin)
        token = secrets.token_bytes(16)
        self._forks[token] = twin
        connection.forks.append(token)
        return Message(pb.Result(token=token))

    def end(self, connection: Connection) -> None:
        """End the stream's session, and its copies that nobody opened."""
        if connection.session is not None:
            self._end(connection.session, connection.account)
            connection.session = None
        for token in connection.forks:
            if token in self._forks:
                self._end(self._forks.pop(token), connection.account)
        connection.forks.clear()

    def _end(self, session: Session, account: Account) -> None:
        session.close()
        self.memory.forget(session)
        account.close_session()

    async def step(self, connection: Connection, message: Message, body: pb.Step) -> Message:
        """Run a step, or answer once more the one that was run last."""
        session = _session_of(connection)
        if body.number == session.number > 0:
            if session.answer is None:
                raise SessionLost("The answer to this step was too large to be kept; send the session's tokens again.")
            hidden = session.answer
        else:
            hidden = await self._run(connection, session, message, body)
        result = pb.Result(leaving=self.is_leaving)
        return await self._hand_over.reply(connection, body, result, {"hidden_states": hidden})

    async def _run(self, connection: Connection, session: Session, message: Message, body: pb.Step) -> torch.Tensor:
        if body.number != session.number + 1:
            raise BadRequest(f"Step {body.number} follows step {session.number}; expected {session.number + 1}.")
        mode = check_mode(self._span, body.context)
        adapter = self._adapters.find(connection, body.context)
        with session.in_use():
            if body.hand_over.awaits:
                message = await self._hand_over.await_push(connection, message, body.hand_over)
            step = read_step(self._span, session, message, body, mode, adapter)
            group = self.steps.group(step)
            hidden = await connection.compute_batched(Priority.STEP, self.steps.run, step, group, step.size)
        session.number, session.answer = body.number, hidden if hidden.nbytes <= _MAX_ANSWER else None
        return hidden


def _session_of(connection: Connection) -> Session:
    if connection.session is None:
        raise BadRequest("No session is open on this stream; open one first.")
    if connection.session.lost:
        raise SessionLost("This session lay idle and its memory went to others; send its tokens again.")
    return connection.session


def read_step(
    span: Span, session: Session, message: Message, body: pb.Step, mode: Mode, adapter: StoredAdapter | None
) -> Step:
    """A step of a session that is not running. Raises `BadRequest`, `TooLong` for what the step can never be."""
    if mode.blocks != session.cache.blocks:
        raise BadRequest("A session's blocks cannot change between its steps.")
    edits = read_edits(body.edits)
    past = tokens_after(edits, session.cache.seen) if session.number else prefix_length(message.tensors)
    inputs = check_inputs(span, message, past, session.memory.max_length)
    if inputs.mask is not None and bool((inputs.mask == 1).all()):
        # With a cache, no mask means the same, and on a GPU the trunk need not look at it, and wait for that. Without
        # one, in training, the trunk would look at positions instead: whether rows are packed.
        inputs = replace(inputs, mask=None)
    prefix = {} if session.number else check_prefix(span, mode, message, inputs.hidden.shape[0])
    return Step(session, inputs, mode, adapter, edits, prefix, body.keep_past)
