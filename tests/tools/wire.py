"""A running peer, and messages for it from below the client."""

import asyncio
import json
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bootstrap.member import Member, MemberOptions
from client.swarm.loop import LOOP
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import SwarmError
from protocol.model.checkpoint import open_checkpoint
from protocol.stream import Carrier
from protocol.tensors import Limits
from tests.tools.lora import lora_manifest
from tests.tools.spans import END, START, WIDTH
from tests.tools.swarm import ForkServer, Peer, new_swarm

MIB = 2**20
MAX_LENGTH = 64
HIDDEN = torch.linspace(-1, 1, 4 * WIDTH).reshape(1, 4, WIDTH)
TARGET = f"{START}.self_attn.q_proj"
"""A module of the peer's."""


@dataclass
class Wire:
    """A running peer, and a member of its swarm that talks to it below the client."""

    peer: Peer
    member: Member
    hello: pb.Hello
    expected: torch.Tensor | None = None
    carrier: Carrier = "auto"

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return LOOP.run(asyncio.wait_for(coroutine, 20))

    async def open(self) -> Channel:
        return Channel(await self.member.transport.connect(self.peer.peer_id, self.carrier), Limits(), 10)

    async def greeted(self) -> Channel:
        channel = await self.open()
        answer = await channel.call(Message(self.hello))
        assert isinstance(answer.body, pb.Welcome)
        assert (answer.body.start, answer.body.end, answer.body.max_length) == (START, END, MAX_LENGTH)
        return channel

    def ask(self, *messages: Message) -> Message:
        """The answer to the last of `messages`, sent over one stream; after a refusal it still serves."""

        async def ask() -> Message:
            channel = await self.greeted()
            try:
                for message in messages:
                    answer = await channel.call(message)
            except SwarmError:
                await self.check_serves(channel)
                raise
            finally:
                channel.close()
            return answer

        return self.run(ask())

    async def check_serves(self, channel: Channel) -> None:
        hidden = (await channel.call(forward())).tensor("hidden_states")
        assert self.expected is not None
        assert torch.equal(hidden, self.expected)

    @contextmanager
    def still_serves(self) -> Iterator[None]:
        """After the block the peer serves a new client, and has met nothing that it did not expect."""
        said = len(self.peer.stderr.read_text())
        yield
        hidden = self.ask(forward()).tensor("hidden_states")
        assert self.expected is not None
        assert torch.equal(hidden, self.expected)
        assert "Traceback" not in self.peer.stderr.read_text()[said:]


@contextmanager
def open_wire(server: ForkServer, model: Path, *options: str, lie: str | None = None) -> Iterator[Wire]:
    """A peer that serves blocks of a small llama, and a connection to its swarm; `lie`: see `liars.py`."""
    checkpoint = open_checkpoint(str(model))
    with new_swarm(server) as swarm:
        limits = ("--max-length", str(MAX_LENGTH), "--cache-tokens", "1024", *options)
        peer = swarm.serve(model, f"{START}:{END}", options=limits, lie=lie)[0]
        member = LOOP.run(Member.join(MemberOptions(tuple(swarm.initial_peers), client_mode=True)))
        LOOP.run(member.directory.peers(checkpoint.model_id.config_hash))  # learns where the peer's door is
        hello = pb.Hello(version=VERSION, config_hash=checkpoint.model_id.config_hash, weights=checkpoint.digests)
        wire = Wire(peer, member, hello)
        wire.expected = wire.ask(forward()).tensor("hidden_states")
        yield wire
        LOOP.run(member.shutdown())


def context(**options: Any) -> pb.Context:
    return pb.Context(**({"start": START, "end": END} | options))


def forward(tensors: Mapping[str, torch.Tensor] | None = None, keep: bool = False, **options: Any) -> Message:
    return Message(pb.Forward(context=context(**options), keep=keep), tensors or {"hidden_states": HIDDEN})


def step(number: int, *edits: pb.CacheEdit, hidden: torch.Tensor = HIDDEN, **tensors: torch.Tensor) -> Message:
    return Message(pb.Step(context=context(), number=number, edits=edits), {"hidden_states": hidden, **tensors})


OPEN = Message(pb.OpenSession(start=START, end=END))


def manifest(**changes: Any) -> dict[str, Any]:
    whole = lora_manifest([TARGET], 4, 2.0)
    (spec,) = whole["adapters"]
    spec |= {key: changes.pop(key) for key in tuple(changes) if key in spec}
    return whole | changes


def put(content: Any, *tensors: torch.Tensor) -> Message:
    given = tensors or (torch.ones(4, 32) / 8, torch.ones(32, 4) / 8)
    text = content if isinstance(content, str) else json.dumps(content)
    return Message(pb.PutAdapter(manifest=text), {str(i): tensor for i, tensor in enumerate(given)})
