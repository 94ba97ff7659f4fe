"""The target `handlers`: a peer's whole service over a real span, reached over streams in memory."""

import asyncio
import logging
import math
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bootstrap.membership.own import OwnMembership
from peer.adapters.store import AdapterStore
from peer.compute.scheduler import Priority, Scheduler
from peer.generation.joined.packing import Packer
from peer.generation.steps import StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.service.adapters import Adapters
from peer.service.base_weights import BaseWeights
from peer.service.entrance import Entrance
from peer.service.generation import Generation
from peer.service.handover import HandOver, Mailbox, Outbox
from peer.service.quotas import Accounts, Quota
from peer.service.reception import Reception
from peer.service.service import Service
from peer.service.training import Training
from peer.service.weights import Weights
from peer.span.loading import load_span
from peer.training.joined.together import Together
from peer.training.runner import TrainingRunner
from peer.training.trainer import Trainer
from peer.weights.sharing import Shared, Sharing
from peer.weights.uploads import ROOM, Uploads
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import SwarmError
from protocol.membership.certificate import Role
from protocol.membership.handshake import Handshake
from protocol.model.checkpoint import open_checkpoint
from protocol.records import ModelVersion
from protocol.tensors import Limits, check_entries, decode
from protocol.weights.making import hold
from tests.tools.fuzzing.carrier import MemoryStream, connect
from tests.tools.fuzzing.choices import Choices
from tests.tools.fuzzing.messages import build_frame, mutated_frame, to_bytes
from tests.tools.fuzzing.requests import Memory, Request, build_bundles, pick_request
from tests.tools.spans import END, START
from tests.tools.swarms import found, let_in
from tests.tools.wire import HIDDEN, MIB, forward

MAX_SECONDS = 5.0
"""That a sequence of requests may take: more is a hang."""
_MAX_REQUESTS = 12
_STREAMS = 3
_CACHE_TOKENS, _MAX_LENGTH = 1024, 64
_LIMITS = Limits(max_header=2**16, max_payload=2**19, max_tensors=300)
_QUOTA = Quota(streams=4, sessions=4, cache_tokens=768, calls=4, adapters=8, adapter_bytes=MIB)
_INNOCENT = ("BadRequest", "WrongModel", "NotAMember", "NotAllowed", "PeerFull", "OverQuota", "SessionLost", "TooLong",
             "UnknownAdapter", "UnknownCall", "BadAdapter", "NotPushed")  # fmt: skip
"""What a peer may say. Anything else would be its own failure."""


@dataclass
class _Client:
    """One stream to a service."""

    stream: MemoryStream
    served: "asyncio.Task[None]"
    memory: Memory

    async def wait(self) -> None:
        """Until all that was sent has been answered, or the stream is over."""
        while not self.served.done() and not self.stream.other.starved.is_set():
            starved = asyncio.ensure_future(self.stream.other.starved.wait())
            await asyncio.wait({self.served, starved}, return_when=asyncio.FIRST_COMPLETED)
            starved.cancel()

    def answers(self) -> list[Message]:
        """What has come, Working left out. Fails for bytes that are no frame."""
        found = []
        while self.stream.pending:
            header, payload = struct.unpack("<IQ", self.stream.pending[:12])
            data = self.stream.pending[12 : 12 + header + payload]
            assert len(data) == header + payload, "half an answer"
            del self.stream.pending[: 12 + header + payload]
            frame = pb.Frame.FromString(bytes(data[:header]))
            check_entries(frame.tensors, payload, Limits())
            body = getattr(frame, frame.WhichOneof("body"))
            if not isinstance(body, pb.Working):
                found.append(Message(body, decode(frame.tensors, data[header:])))
        return found


class _Raised(logging.Handler):
    """Keeps what a service met that it did not expect."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record)


_CLIENTS = ("client", "mallory")


class _Nowhere(Outbox):
    """There is no other peer."""

    def __init__(self) -> None:
        """Of what the other is made of nothing is here."""

    async def push(self, peer_id: str, push: Message) -> bool:
        return False


class Handlers:
    """Plays sequences of requests to a service, and checks after each that nothing is left of it."""

    def __init__(self, model: Path):
        checkpoint = open_checkpoint(str(model))
        self._loop = asyncio.new_event_loop()
        self._span = load_span(checkpoint, START, END)
        self._scheduler = Scheduler()
        self._store = AdapterStore(self._span, 4 * MIB, _QUOTA.adapters, _QUOTA.adapter_bytes or 4 * MIB)
        self._hello = pb.Hello(version=VERSION, config_hash=checkpoint.model_id.config_hash, weights=checkpoint.digests)
        self._version = ModelVersion(checkpoint.model_id, checkpoint.digests)
        self._trainers = [
            Trainer(self._span, self._store, max_kept_bytes=4 * MIB, max_bytes=64 * MIB) for _ in range(2)
        ]
        self._folder = tempfile.TemporaryDirectory()
        founder = found(Path(self._folder.name))
        roles = zip(_CLIENTS, (Role.USE, Role.SERVE), strict=True)
        self._members = {name: OwnMembership(let_in(founder, role=role), name) for name, role in roles}
        memberships = (None, OwnMembership(founder, "peer"))
        self._services = [self._serve(trainer) for trainer in self._trainers]
        self._bundles = build_bundles(model)
        held = hold(checkpoint, model.parent / "kept")
        assert held is not None
        self._sharing, self._uploads = Sharing(lambda: None), Uploads(math.inf)
        self._sharing.add(Shared(checkpoint.model_id, held))
        self._weights = Request(held.manifest.hash, len(held.manifest.pieces))
        self._entrances = [self._enter(*each) for each in zip(self._services, memberships, strict=True)]
        self._raised = _Raised()
        logging.getLogger("peer").addHandler(self._raised)
        logging.getLogger("asyncio").addHandler(self._raised)
        self._expected = self._loop.run_until_complete(self._good_forward())
        self.inputs, self.answers = 0, dict[str, int]()

    def _serve(self, trainer: Trainer) -> Service:
        memory = CacheMemory(_CACHE_TOKENS, _MAX_LENGTH, idle_timeout=0.0, limit=_QUOTA.cache_tokens)
        adapters = Adapters(self._store)
        hand_over = HandOver(Mailbox(_LIMITS.max_payload, patience=0.01), _Nowhere())
        steps = StepRunner(self._span, self._store, Packer(self._span))
        return Service(
            Reception(self._version, self._span, _MAX_LENGTH, Accounts(_QUOTA), _LIMITS),
            self._scheduler,
            Generation(self._span, memory, adapters, steps, hand_over),
            Training(self._span, _MAX_LENGTH, adapters, TrainingRunner(trainer, Together(self._span, 8)), hand_over),
            adapters,
            BaseWeights(self._span),
            hand_over,
            self._span,
        )

    def _enter(self, service: Service, membership: OwnMembership | None) -> Entrance:
        entrance = Entrance(Handshake("peer", membership), Weights(self._sharing, self._uploads), _LIMITS)
        entrance.blocks = service
        return entrance

    def play(self, data: bytes) -> None:
        """The requests that `data` decides on. Raises for anything that should not have happened."""
        began = time.monotonic()
        self._loop.run_until_complete(asyncio.wait_for(self._play(Choices(data)), 60))
        seconds = time.monotonic() - began
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s for one sequence of requests"
        self._check_nothing_is_left()

    def check(self) -> None:
        """A good request is still answered with the right numbers."""
        assert torch.equal(self._loop.run_until_complete(self._good_forward()), self._expected)

    def close(self) -> None:
        """Stop the compute thread."""
        self._scheduler.close()
        self._folder.cleanup()
        logging.getLogger("peer").removeHandler(self._raised)
        logging.getLogger("asyncio").removeHandler(self._raised)
        self._loop.close()

    async def _play(self, choices: Choices) -> None:
        is_private = choices.one_in(8)
        clients: dict[int, _Client] = {}
        opened: list[_Client] = []
        try:
            for _ in range(_MAX_REQUESTS):
                slot = choices.below(_STREAMS)
                if slot not in clients or clients[slot].served.done():
                    clients[slot] = await self._open(choices, is_private, slot)
                    opened.append(clients[slot])
                await self._ask(choices, clients[slot])
                if choices.is_over:
                    break
                if choices.one_in(16):
                    clients.pop(slot).stream.close()
        finally:
            for client in opened:
                client.stream.close()
                await client.served  # raises what a handler raised
            for name in _CLIENTS:  # what is kept for those who have gone is dropped in their turn
                await self._scheduler.submit(Priority.CALL, lambda: None, name)

    async def _open(self, choices: Choices, is_private: bool, slot: int) -> _Client:
        near, far = connect(_CLIENTS[slot == _STREAMS - 1], "peer")
        served = asyncio.ensure_future(self._entrances[is_private].handle(far))
        client = _Client(near, served, Memory(self._hello, self._bundles, self._weights))
        if choices.one_in(8):
            await self._send(client, mutated_frame(choices, self._hello, {}))
            return client
        if is_private:
            await Handshake(far.remote, self._members[far.remote]).initiate(Channel(near, Limits(), MAX_SECONDS))
        client.memory.is_of_weights = choices.one_in(6)
        if not client.memory.is_of_weights:
            await self._send(client, to_bytes(*_serialized(Message(self._hello))))
        return client

    async def _ask(self, choices: Choices, client: _Client) -> None:
        message = pick_request(choices, client.memory)
        await self._send(client, mutated_frame(choices, message.body, message.tensors))

    async def _send(self, client: _Client, data: bytes) -> None:
        self.inputs += 1
        try:
            await client.stream.send(data, patience=None)
        except SwarmError:
            return
        await client.wait()
        for answer in client.answers():
            self._judge(answer.body)
            _learn(client.memory, answer)

    def _judge(self, body: object) -> None:
        name = body.kind if isinstance(body, pb.Failure) else type(body).__name__
        self.answers[name] = self.answers.get(name, 0) + 1
        if self._raised.errors:
            record = self._raised.errors.pop()
            raise AssertionError(record.getMessage()) from (record.exc_info[1] if record.exc_info else None)
        if isinstance(body, pb.Failure):
            assert body.kind in _INNOCENT, f"{body.kind}: {body.message}"
        else:
            assert isinstance(body, pb.Result | pb.Welcome | pb.Proof)

    async def _good_forward(self) -> torch.Tensor:
        near, far = connect("honest", "peer")
        served = asyncio.ensure_future(self._entrances[0].handle(far))
        channel = Channel(near, Limits(), MAX_SECONDS)
        await channel.call(Message(self._hello))
        answer = await channel.call(forward({"hidden_states": HIDDEN}))
        channel.close()
        await served
        return answer.tensor("hidden_states")

    def _check_nothing_is_left(self) -> None:
        assert not self._raised.errors, self._raised.errors[0].getMessage()
        for service, trainer in zip(self._services, self._trainers, strict=True):
            assert (service.memory.sessions, service.requests) == (0, 0)
            assert service.memory.free_tokens == _CACHE_TOKENS, "KV memory is still taken"
            memory, accounts = service.memory, service._reception.accounts
            left = (service._generation._forks, accounts._open, memory._sessions, memory._held, len(trainer.kept))
            assert not any(left), f"left behind: {left}"
        uploads = self._uploads
        assert (uploads._streams, uploads._asked, uploads.room._value) == ({}, {}, ROOM), "weights left behind"


def _serialized(message: Message) -> tuple[bytes, bytes]:
    header, payload = build_frame(message.body, message.tensors)
    return header.SerializeToString(), payload


def _learn(memory: Memory, answer: Message) -> None:
    body = answer.body
    if not isinstance(body, pb.Result):
        return
    memory.call_id = body.call_id or memory.call_id
    if body.token and "hidden_states" not in answer.tensors:
        memory.adapters.append(body.token)  # an adapter's or a copied session's
        memory.tokens.append(body.token)
    if "hidden_states" in answer.tensors and not body.call_id:
        memory.number += 1
