"""Who is let in to the blocks: the beginning of a stream, from its Hello to the Welcome."""

from peer.service.quotas import Account, Accounts
from peer.span.span import Span
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.codecs import SUPPORTED
from protocol.errors import BadRequest, OverQuota, SwarmError, WrongModel
from protocol.records import ModelVersion, same_weights
from protocol.tensors import Limits, wire_dtype


class Reception:
    """Lets in callers that want this model, and have not too many streams yet."""

    def __init__(
        self,
        served: ModelVersion,
        span: Span,
        max_length: int,
        accounts: Accounts,
        limits: Limits,
    ):
        """`max_length`: tokens of one session, as callers are told."""
        self.accounts = accounts
        self._served, self._span, self._max_length = served, span, max_length
        self._limits = limits

    async def admit(self, channel: Channel, first: Message) -> Account:
        """Greet a caller whose first request is `first`; its account. Raises what it was told, or `PeerUnreachable`."""
        try:
            hello = first.body
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

    def _welcome(self) -> pb.Welcome:
        return pb.Welcome(
            version=VERSION,
            weights=self._served.digests,
            start=self._span.start,
            end=self._span.end,
            dtype=wire_dtype(self._span.dtype),
            max_length=self._max_length,
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
