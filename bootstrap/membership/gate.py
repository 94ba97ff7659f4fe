"""The requests of one message each: in a private swarm, only its members may ask and answer.

hivemind's own authorizers know neither the peer nor the method of a request, and see it only after protobuf has parsed
it. The gate stands below them, where requests are bytes: it checks them before anything is parsed.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Self

from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.utils import get_dht_time

from bootstrap.membership.own import OwnMembership
from bootstrap.membership.seal import (
    Nonces,
    Route,
    Sealed,
    SealedRequest,
    is_sealed,
    refusal_answer,
    refusal_in,
)
from protocol.membership.refusals import Refusal, Refused


class Bytes(bytes):
    """Bytes in the form of a protobuf message class, which hivemind expects."""

    @classmethod
    def FromString(cls, data: bytes) -> Self:
        """As protobuf's messages have it."""
        return cls(data)

    def SerializeToString(self) -> bytes:
        """As protobuf's messages have it."""
        return self


class Gate:
    """Stands between a `DHTNode` and its connection to p2pd. Without a membership (open swarm) all requests pass."""

    def __init__(self, p2p: P2P, membership: OwnMembership | None):
        self.peer_id: PeerID = p2p.peer_id
        self._p2p = p2p
        self._membership = membership
        self._seen = Nonces()

    async def add_protobuf_handler(
        self, name: str, handler: Callable[[Any, P2PContext], Awaitable[Any]], input_type: Any, **options: Any
    ) -> None:
        """See `hivemind.P2P`. Only for requests and answers of one message each."""

        async def handle(data: bytes, context: P2PContext) -> Bytes:
            try:
                request = self._let_in(Route(name, context.remote_id, self.peer_id), data)
                body = data if request is None else request.inside.body
            except Refused as refused:
                return Bytes(refusal_answer(refused.why))
            answer: bytes = (await handler(input_type.FromString(body), context)).SerializeToString()
            if request is None or self._membership is None:
                return Bytes(answer)
            return Bytes(request.seal_answer(Sealed(self._membership.certificate(), answer)))

        await self._p2p.add_protobuf_handler(name, handle, Bytes, **options)

    async def remove_protobuf_handler(self, name: str, **options: Any) -> None:
        """See `hivemind.P2P`."""
        await self._p2p.remove_protobuf_handler(name, **options)

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, message: Any, output_type: Any) -> Any:
        """See `hivemind.P2P`. Raises `NotAMember` when `peer_id` refuses us, or is no member of our swarm."""
        route, body = Route(name, self.peer_id, peer_id), message.SerializeToString()
        if self._membership is None:
            answer = _granted(await self._send(route, body))
        else:
            answer = await self._ask_sealed(self._membership, route, body)
        return output_type.FromString(answer)

    def _let_in(self, route: Route, data: bytes) -> SealedRequest | None:
        """The request in `data`; None for a plain one in an open swarm. Raises `Refused`."""
        if self._membership is not None:
            request = SealedRequest.open(self._membership.secret, route, data, get_dht_time(), self._seen)
            self._membership.standing(route.sender.to_base58(), request.inside.certificate)
            return request
        if is_sealed(data):
            raise Refused(Refusal.OPEN)
        return None

    async def _ask_sealed(self, membership: OwnMembership, route: Route, body: bytes) -> bytes:
        inside = Sealed(membership.certificate(), body)
        request = SealedRequest.seal(membership.secret, route, inside, get_dht_time())
        answer = request.open_answer(_granted(await self._send(route, request.to_bytes())))
        try:
            membership.standing(route.receiver.to_base58(), answer.certificate)
        except Refused as refused:
            raise refused.why.error(f"peer {route.receiver}") from None
        return answer.body

    async def _send(self, route: Route, data: bytes) -> bytes:
        answer: bytes = await self._p2p.call_protobuf_handler(route.receiver, route.method, Bytes(data), Bytes)
        return answer


def _granted(answer: bytes) -> bytes:
    """`answer`, unless it is a refusal, which is raised as the error that it stands for."""
    refusal = refusal_in(answer)
    if refusal is not None:
        raise refusal.error()
    return answer
