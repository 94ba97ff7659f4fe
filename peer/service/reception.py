"""Who is let in: a stream's beginning, from the first frame to the Welcome."""

from dataclasses import dataclass

from peer.service.quotas import Account, Accounts
from peer.span.span import Span
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.codecs import SUPPORTED
from protocol.errors import (
    BadRequest,
    OverQuota,
    SwarmError,
    WrongModel,
)
from protocol.handshake import Handshake
from protocol.records import ModelId, same_weights
from protocol.stream import Stream
from protocol.tensors import Limits, wire_dtype

_PATIENCE = 60.0


@dataclass(frozen=True)
class Served:
    """The model that a peer serves blocks of."""

    model_id: ModelId
    digests: dict[str, str]


class Reception:
    """Lets in callers that hold the swarm's key, want this model, and have not too many streams yet."""

    def __init__(self, served: Served, span: Span, accounts: Accounts, limits: Limits, handshake: Handshake):
        self.accounts = accounts
        self._served, self._span, self._limits, self._handshake = served, span, limits, handshake

    def open(self, stream: Stream) -> Channel:
        """A channel with this peer's limits."""
        return Channel(stream, self._limits, _PATIENCE)

    async def admit(self, channel: Channel) -> Account:
        """Greet a caller; its account. Raises what the caller was told, or `PeerUnreachable`."""
        try:
            hello = (await self._handshake.respond(channel)).body
            if not isinstance(hello, pb.Hello):
                raise BadRequest("A stream must begin with a Hello.")
            self._check(hello)
        except SwarmError as error:
            await channel.fail(error)
            raise
        await channel.send(Message(self._welcome()))
        try:
            return self.accounts.enter(channel.remote)
        except OverQuota as error:
            await channel.fail(error)
            raise

    def check_current(self, channel: Channel) -> None:
        """Raises `PeerFailed` when the key of `channel` has been dropped since it was let in."""
        self._handshake.check_current(channel)

    def _welcome(self) -> pb.Welcome:
        return pb.Welcome(
            version=VERSION,
            weights=self._served.digests,
            start=self._span.start,
            end=self._span.end,
            dtype=wire_dtype(self._span.dtype),
            max_length=self.accounts.max_length,
            max_frame=self._limits.max_payload,
            codecs=sorted(SUPPORTED),
        )

    def _check(self, hello: pb.Hello) -> None:
        name = self._served.model_id.name
        if hello.version != VERSION:
            raise BadRequest(f"The client speaks protocol version {hello.version}, this peer {VERSION}; update one.")
        if hello.config_hash != self._served.model_id.config_hash:
            raise WrongModel(f"This peer serves {name}; the client asks for a model of another configuration.")
        if not same_weights(self._served.digests, hello.weights):
            raise WrongModel(
                f"This peer serves {name} with other weights than the client's; "
                "load the same revision of the model on both ends."
            )
