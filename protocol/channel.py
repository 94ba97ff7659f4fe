"""Frames over a stream: a protobuf body with its tensors, one request and one answer at a time."""

import asyncio
import struct
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage

from protocol import swarm_pb2 as pb
from protocol.codecs import SUPPORTED
from protocol.errors import BadRequest, from_failure, to_failure
from protocol.stream import Stream
from protocol.tensors import Encoded, Limits, check_entries, decode, decoded_size, encode_all, nbytes

VERSION = 1
PUSH_TOKEN_BYTES = 16
"""Bytes of the random token by which a client names a `Push`."""
_LENGTHS = struct.Struct("<IQ")
_INLINE = 2**16
"""Up to so many bytes, tensors are coded and decoded on the event loop: another thread would delay a step more."""
_INLINE_HEADER = 2**12
"""Up to so many bytes, a header is parsed on the event loop."""
_ASIDE = ThreadPoolExecutor(1, "headers")
"""One thread for large headers: parsing holds the GIL, so that more threads would only keep the event loop waiting."""
_CALL_TENSORS = 1024
"""Tensors of a training call or a step: a few, and two for each block that has a KV prefix."""
_MAX_TENSORS = {
    "forward": _CALL_TENSORS, "backward": _CALL_TENSORS, "step": _CALL_TENSORS, "push": 1, "factorize": 3, "ping": 1,
}  # fmt: skip
"""Kind of message -> the tensors that it may have. Adapters and answers have the limit of `Limits`, all others none."""
_TENSOR_COST = 1024
"""Bytes that quotas count for each tensor's header entry: reading it takes about as long as so many bytes."""
_FIELD_OF_TYPE = {f.message_type.name: f.name for f in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}  # type: ignore[union-attr]


T = TypeVar("T")
OnWorking = Callable[[pb.Working], Awaitable[None]]


@dataclass(frozen=True)
class Message:
    """A body (one of the messages in Frame.body) and the tensors that came with it."""

    body: ProtoMessage
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    codecs: Mapping[str, int] = field(default_factory=dict)
    """Tensor name -> the codec that it is to travel in, RAW where none is given. Empty in a received message."""
    cost: int = 0
    """Bytes of a received message as quotas count them: header, decoded tensors, and `_TENSOR_COST` a tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`. Raises `BadRequest` when it is missing."""
        if name not in self.tensors:
            raise BadRequest(f"{type(self.body).__name__} came without its tensor {name!r}.")
        return self.tensors[name]


class Standing(Protocol):
    """What the other end of a channel is in a private swarm, now."""

    @property
    def role(self) -> int:
        """See `protocol.membership.certificate.Role`. Raises as `check`."""

    def check(self) -> None:
        """Raises `NotAMember` when it is no member any more."""


class Channel:
    """A stream that carries messages: one request, then its answer. Not for concurrent use.

    `patience` (seconds): how long the other end may be silent inside a message, and before an answer.
    """

    def __init__(self, stream: Stream, limits: Limits, patience: float):
        self.stream = stream
        self.limits = limits
        self.remote_limit = limits.max_payload
        """Bytes of tensors that the other end takes in one message."""
        self.remote_codecs = SUPPORTED
        """Codecs that the other end reads. A tensor that is to travel in another codec travels RAW."""
        self.patience = patience
        self.standing: Standing | None = None
        """The other end's, checked with every message; None in an open swarm. See `protocol.membership.handshake`."""

    @property
    def remote(self) -> str:
        """The remote's peer ID."""
        return self.stream.remote

    async def send(self, message: Message) -> None:
        """Write one frame. Raises `BadRequest` when it is over the limits, `PeerUnreachable` when the stream broke,
        `NotAMember` when the other end is to get nothing any more but a refusal."""
        if not isinstance(message.body, pb.Failure):
            self.check_standing()
        coded = await self._encode(message) if message.codecs else encode_all(message.tensors, {})
        frame = pb.Frame(tensors=coded.entries)
        getattr(frame, _FIELD_OF_TYPE[type(message.body).__name__]).CopyFrom(message.body)
        header = frame.SerializeToString()
        if len(header) > self.limits.max_header or max(coded.nbytes, coded.decoded) > self.remote_limit:
            raise self._too_long(len(header), max(coded.nbytes, coded.decoded), self.remote_limit)
        prefix = _LENGTHS.pack(len(header), coded.nbytes) + header
        await self.stream.send(prefix, *coded.data, patience=self.patience)

    async def receive_request(self) -> Message:
        """Wait for one frame, without a time limit, and read it.

        Raises `BadRequest` for a malformed one, `NotAMember` for one of who is no member any more.
        """
        return await self._receive(None)

    async def receive_answer(self, on_working: OnWorking | None = None) -> Message:
        """Read the answer to a request. Raises the error that the other end reports.

        `on_working` is awaited for every sign of life before it.
        """
        while True:
            message = await self._receive(self.patience)
            if isinstance(message.body, pb.Failure):
                raise from_failure(message.body, self.remote)
            if not isinstance(message.body, pb.Working):
                return message
            if on_working is not None:
                await on_working(message.body)

    async def call(self, message: Message, on_working: OnWorking | None = None) -> Message:
        """Send a request and wait for its answer; see `receive_answer`."""
        await self.send(message)
        return await self.receive_answer(on_working)

    async def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        await self.send(Message(to_failure(error)))

    def check_standing(self) -> None:
        """Raises `NotAMember` when the other end is no member of the swarm any more."""
        if self.standing is not None:
            self.standing.check()

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()

    async def _receive(self, patience: float | None) -> Message:
        header_length, payload_length = _LENGTHS.unpack(await self.stream.receive(_LENGTHS.size, patience))
        if header_length > self.limits.max_header or payload_length > self.limits.max_payload:
            raise self._too_long(header_length, payload_length, self.limits.max_payload)
        # A payload is read once its header has been checked; a small one that is there already is taken along with it.
        ready = payload_length if header_length + payload_length <= min(self.stream.available, _INLINE) else 0
        data = await self.stream.receive(header_length + ready, self.patience)
        header, payload = bytes(data[:header_length]), data[header_length:]
        is_large = header_length > _INLINE_HEADER
        parsed = await _aside(self._parse, header, payload_length) if is_large else self._parse(header, payload_length)
        frame, size = parsed
        if payload_length > ready:
            payload = await self.stream.receive(payload_length, self.patience)
        if is_large:
            tensors = await _aside(decode, frame.tensors, payload)
        elif size <= _INLINE or decoded_size(frame.tensors) <= _INLINE:
            tensors = decode(frame.tensors, payload)
        else:
            tensors = await asyncio.to_thread(decode, frame.tensors, payload)
        self.check_standing()
        cost = header_length + size + _TENSOR_COST * len(tensors)
        return Message(getattr(frame, frame.WhichOneof("body")), tensors, cost=cost)

    def _parse(self, header: bytes, payload: int) -> tuple[pb.Frame, int]:
        """A checked header, and the bytes that its tensors will take."""
        try:
            frame = pb.Frame.FromString(header)
        except DecodeError as error:
            raise BadRequest("A frame's header is not a valid message.") from error
        kind = frame.WhichOneof("body")
        if kind is None:
            raise BadRequest("A frame came without a body.")
        most = self.limits.max_tensors
        if kind not in ("put_adapter", "result"):
            most = min(most, _MAX_TENSORS.get(kind, 0))
        return frame, check_entries(frame.tensors, payload, replace(self.limits, max_tensors=most))

    async def _encode(self, message: Message) -> Encoded:
        """The tensors under those of their codecs that the other end reads; many of them on another thread."""
        codecs = {name: codec for name, codec in message.codecs.items() if codec in self.remote_codecs}
        coded = {name: message.tensors[name] for name, codec in codecs.items() if codec and name in message.tensors}
        if nbytes(coded) <= _INLINE:
            return encode_all(message.tensors, codecs)
        return await asyncio.to_thread(encode_all, message.tensors, codecs)

    def _too_long(self, header: int, payload: int, max_payload: int) -> BadRequest:
        return BadRequest(
            f"A frame of {header} + {payload} bytes is over the limit of {self.limits.max_header} + "
            f"{max_payload}; send fewer tokens at once."
        )


async def _aside(work: Callable[..., T], *arguments: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(_ASIDE, work, *arguments)
