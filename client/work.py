"""What a piece of work on remote blocks consists of, and how it is put into messages."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from client.adapters import Bundle, Snapshot
from client.config import SwarmConfig
from client.routing import Hop
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message, OnWorking
from protocol.codecs import NAMES
from protocol.connections import Connections
from protocol.errors import PeerFailed, UnknownAdapter
from protocol.tensors import wire_dtype

_MAX_PUTS = 256

Prefix = Mapping[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Codecs:
    """How hidden states and their gradients travel: numbers of `pb.Codec`."""

    out: int = pb.RAW
    back: int = pb.RAW
    gradients: int = pb.RAW

    @classmethod
    def of(cls, config: SwarmConfig) -> "Codecs":
        """As a configuration says."""
        return cls(NAMES[config.codec_out], NAMES[config.codec_back], NAMES[config.codec_gradients])

    @property
    def of_request(self) -> dict[str, int]:
        """Of a request's tensors, by name."""
        return {"hidden_states": self.out, "grad": self.gradients}

    def among(self, known: Collection[int]) -> "Codecs":
        """These, RAW in the place of what is not `known`."""
        used = (codec if codec in known else pb.RAW for codec in (self.out, self.back, self.gradients))
        return Codecs(*used)


@dataclass(frozen=True)
class Work:
    """How hidden states are to be taken through blocks."""

    mask: torch.Tensor | None = None
    """(batch, cached + new tokens), as the user gave it."""
    positions: torch.Tensor | None = None
    """(batch or 1, new tokens), as the user gave them."""
    training: bool = False
    dropout_seed: int | None = None
    autocast: torch.dtype | None = None
    adapters: Snapshot | None = None
    prefix: Prefix = field(default_factory=dict)
    """Block -> (key, value)."""
    codecs: Codecs = Codecs()

    def bundle(self, hop: Hop) -> Bundle | None:
        """The adapters on a hop's blocks."""
        return self.adapters.bundle(range(hop.start, hop.end)) if self.adapters else None

    def context(self, hop: Hop, is_backward: bool = False) -> pb.Context:
        """The wire's description of this work on a hop's blocks."""
        bundle = self.bundle(hop)
        return pb.Context(
            start=hop.start,
            end=hop.end,
            adapter=bundle.key if bundle else b"",
            training=self.training,
            dropout_seed=self.dropout_seed,
            autocast=wire_dtype(self.autocast),
            answer=self.codecs.gradients if is_backward else self.codecs.back,  # type: ignore[arg-type]
        )

    def tensors(self, hop: Hop, hidden: torch.Tensor | None, with_prefix: bool = True) -> dict[str, torch.Tensor]:
        """The tensors that go with a request for a hop's blocks. `hidden` is None when another peer pushes them."""
        tensors = {"hidden_states": hidden} if hidden is not None else {}
        if self.mask is not None:
            tensors["attention_mask"] = self.mask
        if self.positions is not None:
            tensors["position_ids"] = self.positions
        if with_prefix:
            for block in range(hop.start, hop.end):
                if block in self.prefix:
                    tensors[f"prefix.{block}.key"], tensors[f"prefix.{block}.value"] = self.prefix[block]
        return tensors


class Puts:
    """The adapters put of late. What several micro-batches in flight find missing at the same time is sent once."""

    def __init__(self) -> None:
        self._latest = OrderedDict[tuple[str, bytes], asyncio.Future[None]]()

    def last_done(self, peer_id: str, key: bytes) -> "asyncio.Future[None] | None":
        """The last put of an adapter to a peer, unless it is going on."""
        latest = self._latest.get((peer_id, key))
        return latest if latest is not None and latest.done() else None

    async def put(self, channel: Channel, bundle: Bundle, seen: "asyncio.Future[None] | None") -> None:
        """Give the peer an adapter that it missed after the put `seen`: by waiting, if there was another since."""
        slot = (channel.remote, bundle.key)
        latest = self._latest.get(slot)
        if latest is not None and latest is not seen:
            await asyncio.wait({latest})
            return
        self._latest[slot] = done = asyncio.get_running_loop().create_future()
        self._latest.move_to_end(slot)
        while len(self._latest) > _MAX_PUTS:
            self._latest.popitem(last=False)
        try:
            await channel.call(Message(pb.PutAdapter(manifest=bundle.manifest), bundle.tensors))
        finally:
            done.set_result(None)


async def call_with_adapter(
    puts: Puts, channel: Channel, message: Message, bundle: Bundle | None, on_working: OnWorking | None = None
) -> tuple[Message, float]:
    """Call; when the peer does not hold the adapter, put it and call again. Returns the seconds of the call alone, too.

    One that is being trained is new to every peer after each optimizer step, and is put first; others may be there.
    """
    if bundle and bundle.is_trained:
        await puts.put(channel, bundle, None)
    seen = puts.last_done(channel.remote, bundle.key) if bundle else None
    try:
        return await _timed_call(channel, message, on_working)
    except UnknownAdapter:
        if bundle is None:
            raise PeerFailed(f"Peer {channel.remote} misses an adapter that the call does not name.") from None
    await puts.put(channel, bundle, seen)
    return await _timed_call(channel, message, on_working)


async def _timed_call(channel: Channel, message: Message, on_working: OnWorking | None) -> tuple[Message, float]:
    begin = time.perf_counter()
    answer = await channel.call(message, on_working)
    return answer, time.perf_counter() - begin


def answered_hidden(answer: Message, like: torch.Tensor, remote: str) -> torch.Tensor:
    """The hidden states in an answer, as `like` in shape and dtype. Raises `PeerFailed` when they are not."""
    hidden = answer.tensors.get("hidden_states")
    if hidden is None or hidden.shape != like.shape or not hidden.is_floating_point():
        raise PeerFailed(f"Peer {remote} answered with something else than hidden states of {list(like.shape)}.")
    return hidden.to(like.device, like.dtype)


async def read_norms(
    connections: Connections, hop: Hop, names: list[str], transposed: bool, dims: tuple[int, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The norms of base weights that a hop's peer holds."""
    request = pb.ReadWeight(names=names, transposed=transposed, norm_dims=dims, dtype=wire_dtype(dtype))
    async with connections.channel(hop.peer.peer_id) as channel:
        answer = await channel.call(Message(request))
    return {name: answer.tensor(f"value.{i}") for i, name in enumerate(names)}
