"""The DHT's requests: in a private swarm, only members that hold its key may ask and answer.

hivemind's own authorizers know neither the peer nor the method of a request, and see it only after protobuf has parsed
it. The gate stands below them, where requests are bytes: it checks them before anything is parsed.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

from hivemind.p2p import P2PContext, PeerID
from hivemind.utils import get_dht_time

from bootstrap.daemon import Connection
from bootstrap.seal import Nonces, Refusal, Refused, Route, SealedRequest, is_sealed, refusal_in
from protocol.swarm_key import Keyring, SwarmKey


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
    """Stands between a `DHTNode` and its connection to p2pd. Without a keyring (open swarm) all requests pass."""

    def __init__(self, p2p: Connection, keyring: Keyring | None):
        self.peer_id: PeerID = p2p.peer_id
        self._p2p = p2p
        self._keyring = keyring
        self._seen = Nonces()

    async def add_protobuf_handler(
        self, name: str, handler: Callable[[Any, P2PContext], Awaitable[Any]], input_type: Any, **options: Any
    ) -> None:
        """See `hivemind.P2P`. Only for requests and answers of one message each."""

        async def handle(data: bytes, context: P2PContext) -> Bytes:
            try:
                request = self._let_in(Route(name, context.remote_id, self.peer_id), data)
            except Refused as refused:
                return Bytes(refused.why.to_answer())
            message = input_type.FromString(data if request is None else request.body)
            answer: bytes = (await handler(message, context)).SerializeToString()
            return Bytes(answer if request is None else request.seal_answer(answer))

        await self._p2p.add_protobuf_handler(name, handle, Bytes, **options)

    async def remove_protobuf_handler(self, name: str, **options: Any) -> None:
        """See `hivemind.P2P`."""
        await self._p2p.remove_protobuf_handler(name, **options)

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, message: Any, output_type: Any) -> Any:
        """See `hivemind.P2P`. Raises `WrongKey` when `peer_id` refuses us or shows no key of ours."""
        route, body = Route(name, self.peer_id, peer_id), message.SerializeToString()
        if self._keyring is None:
            answer = _granted(await self._send(route, body))
        else:
            answer = await self._ask_sealed(self._keyring.current(), route, body)
        return output_type.FromString(answer)

    def _let_in(self, route: Route, data: bytes) -> SealedRequest | None:
        """The request in `data`; None for a plain one in an open swarm. Raises `Refused`."""
        if self._keyring is not None:
            return SealedRequest.open(self._keyring.current(), route, data, get_dht_time(), self._seen)
        if is_sealed(data):
            raise Refused(Refusal.OPEN)
        return None

    async def _ask_sealed(self, keys: Sequence[SwarmKey], route: Route, body: bytes) -> bytes:
        """The answer under the first of `keys` that the receiver accepts: it may be a step behind in a rotation."""
        for key in keys:
            request = SealedRequest.seal(key, route, body, get_dht_time())
            answer = await self._send(route, request.to_bytes())
            if refusal_in(answer) is not Refusal.WRONG_KEY:
                return request.open_answer(_granted(answer))
        raise Refusal.WRONG_KEY.error()

    async def _send(self, route: Route, data: bytes) -> bytes:
        answer: bytes = await self._p2p.call_protobuf_handler(route.receiver, route.method, Bytes(data), Bytes)
        return answer


def _granted(answer: bytes) -> bytes:
    """`answer`, unless it is a refusal, which is raised as the error that it stands for."""
    refusal = refusal_in(answer)
    if refusal is not None:
        raise refusal.error()
    return answer
