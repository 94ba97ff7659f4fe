"""What a piece of work on remote blocks consists of, and how it is put into messages."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from client.adapters.bundle import AdapterBundle, Snapshot
from client.swarm.config import SwarmConfig
from client.swarm.routes import Hop
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.codecs import NAMES
from protocol.errors import PeerFailed
from protocol.tensors import KvPrefix, wire_dtype


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

    @cached_property
    def of_request(self) -> Mapping[str, int]:
        """Of a request's tensors, by name; of those that travel RAW, nothing."""
        codecs = {"hidden_states": self.out, "grad": self.gradients}
        return {name: codec for name, codec in codecs.items() if codec != pb.RAW}

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
    prefix: KvPrefix = field(default_factory=dict)
    codecs: Codecs = Codecs()

    def bundle(self, hop: Hop) -> AdapterBundle | None:
        """The adapters on a hop's blocks."""
        return self.adapters.bundle(range(hop.start, hop.end)) if self.adapters else None

    def context(self, hop: Hop, bundle: AdapterBundle | None, is_backward: bool = False) -> pb.Context:
        """The wire's description of this work on a hop's blocks, with the adapters `bundle` on them."""
        return pb.Context(
            start=hop.start,
            end=hop.end,
            adapter=bundle.key if bundle else b"",
            training=self.training,
            dropout_seed=self.dropout_seed,
            autocast=wire_dtype(self.autocast) if self.autocast else pb.DTYPE_NONE,
            answer=self.codecs.gradients if is_backward else self.codecs.back,  # type: ignore[arg-type]
        )

    def tensors(self, hop: Hop, hidden: torch.Tensor | None, with_prefix: bool = True) -> dict[str, torch.Tensor]:
        """The tensors that go with a request for a hop's blocks. `hidden` is None when another peer pushes them."""
        tensors = {"hidden_states": hidden} if hidden is not None else {}
        if self.mask is not None:
            tensors["attention_mask"] = self.mask
        if self.positions is not None:
            tensors["position_ids"] = self.positions
        if with_prefix and self.prefix:
            for block in range(hop.start, hop.end):
                if block in self.prefix:
                    tensors[f"prefix.{block}.key"], tensors[f"prefix.{block}.value"] = self.prefix[block]
        return tensors


def result_of(answer: Message) -> pb.Result:
    """The body of an answer; an empty one where a peer answered with something else."""
    return answer.body if isinstance(answer.body, pb.Result) else pb.Result()


def answered_hidden(answer: Message, like: torch.Tensor, remote: str) -> torch.Tensor:
    """The hidden states in the answer of the peer `remote`, in the shape and the dtype of `like`.

    Raises `PeerFailed` when the answer has none of that shape.
    """
    hidden = answer.tensors.get("hidden_states")
    if hidden is None or hidden.shape != like.shape or not hidden.is_floating_point():
        raise PeerFailed(f"Peer {remote} answered with something else than hidden states of {list(like.shape)}.")
    return hidden.to(like.dtype)
