"""The message Push: hidden states that come from another peer, and those that go to another.

A client sends the requests of a step to all peers of its route at once. Each but the first names a token under which
its hidden states will come from the peer before it, so that a step takes one trip through the swarm instead of one to
every peer and back.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from bootstrap.member import Member
from peer.service.connection import Connection
from protocol import swarm_pb2 as pb
from protocol.channel import PUSH_TOKEN_BYTES, Message
from protocol.connections import Connections
from protocol.errors import BadRequest, NotPushed, SwarmError
from protocol.membership.certificate import Role
from protocol.membership.handshake import require
from protocol.records import ModelVersion
from protocol.tensors import nbytes

_KEPT = 30.0
"""Seconds for which a push waits for its request."""
_MAX_KEPT = 1024
_PATIENCE = 4.0
"""Seconds. Less than a client's own: it must hear that the next peer is out of reach before it gives this one up."""
_LOOK_UP_PERIOD = 2.0
"""Seconds between two looks for a peer that the directory did not know."""
logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
Request = pb.Step | pb.Forward | pb.Backward
"""The requests whose results may be handed over."""


@dataclass(frozen=True)
class _Parcel:
    tensors: Tensors
    expiry: asyncio.TimerHandle


@dataclass
class Mailbox:
    """Pushes that came before their requests, and requests that wait for their pushes.

    A push that no request asks for is dropped after a while, and sooner when all together take over `max_bytes`.
    """

    max_bytes: int
    patience: float = 600.0
    """Seconds that a request waits for its push."""
    _parcels: dict[bytes, _Parcel] = field(default_factory=dict)
    """Oldest first."""
    _awaited: dict[bytes, "asyncio.Future[Tensors]"] = field(default_factory=dict)

    async def take(self, token: bytes) -> Tensors:
        """What is pushed under `token`, once it is here.

        Raises `BadRequest` for a token of the wrong length or in use, `NotPushed` when nothing comes.
        """
        if len(token) != PUSH_TOKEN_BYTES or token in self._awaited:
            raise BadRequest(f"A token has {PUSH_TOKEN_BYTES} bytes, and one request waits for it.")
        if token in self._parcels:
            return self._remove(token)
        self._awaited[token] = future = asyncio.Future[Tensors]()
        try:
            async with asyncio.timeout(self.patience):
                await asyncio.wait({future})
                return future.result()
        except TimeoutError as error:
            raise NotPushed(f"No other peer pushed what this request waits for within {self.patience:g} s.") from error
        finally:
            del self._awaited[token]

    def put(self, token: bytes, tensors: Tensors) -> None:
        """Keep a push. Raises `BadRequest` for a token of the wrong length, or more than one tensor."""
        if len(token) != PUSH_TOKEN_BYTES or len(tensors) != 1:
            raise BadRequest(f"A Push has a token of {PUSH_TOKEN_BYTES} bytes and one tensor.")
        awaited = self._awaited.get(token)
        if awaited is not None and not awaited.done():
            awaited.set_result(tensors)
            return
        if token in self._parcels:
            self._remove(token)
        expiry = asyncio.get_running_loop().call_later(_KEPT, self._remove, token)
        self._parcels[token] = _Parcel(tensors, expiry)
        self._make_room()

    def _make_room(self) -> None:
        total = sum(nbytes(parcel.tensors) for parcel in self._parcels.values())
        while total > self.max_bytes or len(self._parcels) > _MAX_KEPT:
            total -= nbytes(self._remove(next(iter(self._parcels))))

    def _remove(self, token: bytes) -> Tensors:
        parcel = self._parcels.pop(token)
        parcel.expiry.cancel()  # or it would remove what comes next under this token
        return parcel.tensors


class Outbox:
    """Pushes to other peers of the model, of those alone that the directory knows."""

    def __init__(self, member: Member, version: ModelVersion):
        self._member, self._config_hash = member, version.model_id.config_hash
        self._connections = Connections(lambda: member, version, _PATIENCE, lambda peer_id, seconds: None)
        self._known: Collection[str] = ()
        self._looked_up = float("-inf")
        self._look_up = asyncio.Lock()

    async def push(self, peer_id: str, push: Message) -> bool:
        """Send a `Push`. Returns whether it could be sent; whether it arrives is not known."""
        try:
            if not await self._is_known(peer_id):
                return False
            async with self._connections.channel(peer_id) as channel:
                await channel.send(push)
        except SwarmError as error:
            logger.debug("nothing could be pushed to %s: %s", peer_id, error)
            self._connections.forget(peer_id)
            return False
        return True

    async def _is_known(self, peer_id: str) -> bool:
        """Clients say where to push; this keeps them from having the peer dial whatever they like."""
        async with self._look_up:
            if peer_id not in self._known and time.monotonic() - self._looked_up > _LOOK_UP_PERIOD:
                self._known = {peer.peer_id for peer in await self._member.directory.peers(self._config_hash)}
                self._looked_up = time.monotonic()
        return peer_id in self._known


class HandOver:
    """Takes the message Push, waits for what other requests await of it, and pushes their results on."""

    def __init__(self, mailbox: Mailbox, outbox: Outbox):
        self._mailbox, self._outbox = mailbox, outbox

    def take_push(self, connection: Connection, message: Message, body: pb.Push) -> None:
        """Keep what was pushed for its request, which fails if it never comes.

        There is no answer, not even to a push that is refused: it would be taken for that to the next request.
        """
        try:
            require(connection.channel, Role.SERVE)
            with connection.account.request(message.cost):
                self._mailbox.put(body.token, message.tensors)
        except SwarmError as error:
            logger.debug("a push of %s was dropped: %s", connection.client, error)

    async def await_push(self, connection: Connection, message: Message, hand_over: pb.HandOver) -> Message:
        """A request with the tensor that comes from another peer, once it is here.

        Raises `BadRequest`, `NotPushed` as `Mailbox.take`.
        """
        if not hand_over.awaits:
            return message
        waiting = asyncio.ensure_future(self._mailbox.take(hand_over.awaits))
        pushed = await connection.with_signs_of_life(waiting, pb.Working(waiting=True))
        return Message(message.body, {**message.tensors, **pushed})

    async def reply(
        self,
        connection: Connection,
        body: Request,
        result: pb.Result,
        tensors: dict[str, torch.Tensor],
        name: str = "hidden_states",
    ) -> Message:
        """The answer to a request, when its result `name` has been pushed to where it is wanted, if anywhere."""
        codecs = {name: body.context.answer}
        if body.hand_over.to:
            wanted_as = name.removesuffix(".hidden_states")
            push = Message(
                pb.Push(token=body.hand_over.token), {wanted_as: tensors[name]}, {wanted_as: body.context.answer}
            )
            # The next peer may hang, and this one is not to look as if it did.
            pushing = asyncio.ensure_future(self._outbox.push(body.hand_over.to, push))
            result.pushed = await connection.with_signs_of_life(pushing)
            if result.pushed and not body.hand_over.copy:
                del tensors[name]
        return Message(result, tensors, codecs)
