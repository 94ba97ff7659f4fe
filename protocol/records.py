"""Records that members keep in the DHT: peers' announcements, complaints, and what identifies a model."""

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.errors import BadRequest, first_problem

MAX_BLOCKS = 4096
MAX_RECORD_BYTES = 8192

MAX_NAME = 100
MAX_ADDRESSES = 20
MAX_DOOR_ADDRESSES = 8


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("text of a record must be printable, for it is shown to people")
    return text


Text = Annotated[str, AfterValidator(_check_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ConfigHash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\.?")


def _check_host(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            raise ValueError("neither an IP address nor a host's name") from None
        return host
    if address.is_unspecified or address.is_multicast or "%" in host:
        raise ValueError("an IP address that nobody can connect to")
    return host


HostText = Annotated[str, Field(max_length=253), AfterValidator(_check_host)]
Port = Annotated[int, Field(gt=0, lt=2**16)]
PeerIdText = Annotated[str, Field(pattern=r"^[1-9A-HJ-NP-Za-km-z]{20,80}$")]


class Record(BaseModel):
    """What members tell each other as JSON: of no use unless all of it is as declared."""

    MAX_BYTES: ClassVar[int] = MAX_RECORD_BYTES
    model_config = ConfigDict(frozen=True, extra="ignore", strict=False, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Canonical JSON, UTF-8."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The record in `data`. Raises `BadRequest` for anything that is not one, over-long data included."""
        if len(data) > cls.MAX_BYTES:
            raise BadRequest(f"A record of {len(data)} bytes is over the limit of {cls.MAX_BYTES}.")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise BadRequest(f"Not a {cls.__name__}: {first_problem(error)[1]}.") from error


class ModelId(Record):
    """What identifies a model in a swarm. Peers and clients meet under `config_hash`; `name` is for people."""

    name: Text = Field(max_length=200)
    config_hash: ConfigHash
    """Hash of the configuration: equal for equal architecture and sizes. Weights are compared by digests."""
    num_blocks: int = Field(gt=0, le=MAX_BLOCKS)


@dataclass(frozen=True)
class ModelVersion:
    """A model with one revision's weights: what both ends of a connection must hold."""

    model_id: ModelId
    digests: Mapping[str, str]
    """Weight file -> its digest; see `Checkpoint.digests`."""


def same_weights(ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Whether two sets of digests (file -> digest) can be of one checkpoint: they share files and agree on these."""
    common = ours.keys() & theirs.keys()
    return bool(common) and all(ours[name] == theirs[name] for name in common)


class PeerState(StrEnum):
    """What a peer is doing, as it announces it."""

    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


class Speed(Record):
    """How fast a peer ran its own blocks when it measured itself."""

    decode: float = Field(gt=0)
    """Blocks x tokens per second, one sequence, one token at a time."""
    forward: float = Field(gt=0)
    """Blocks x tokens per second, a batch of a few hundred tokens."""


class Share(Record):
    """A part of a peer's memory, in bytes."""

    used: int = Field(ge=0, lt=2**60)
    total: int = Field(ge=0, lt=2**60)

    def describe(self) -> str:
        """For people."""
        return f"{self.used / max(1, self.total):.1%} of {self.total / 1e9:,.2f} GB"


class MemoryShares(Record):
    """What a peer's memory is for, besides weights and the call that runs, and how much of that is used."""

    cache: Share
    """KV caches of sessions."""
    kept: Share
    """Activations that forwards left for their backwards."""
    adapters: Share

    def describe(self) -> str:
        """A line for people."""
        parts = (("KV caches", self.cache), ("kept activations", self.kept), ("adapters", self.adapters))
        return ", ".join(f"{name} {share.describe()}" for name, share in parts)


class Door(Record):
    """Where a peer answers direct connections, and how it is known there."""

    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The SHA-256 of its TLS certificate (DER)."""
    addresses: tuple[tuple[HostText, Port], ...] = Field(min_length=1, max_length=MAX_DOOR_ADDRESSES)
    """IP addresses or host names, with TCP ports."""


class Trainable(Record):
    """What a peer can train, as far as it foresees that. Adapters take memory, too: with large ones it may be less."""

    row: int = Field(ge=0, lt=2**40)
    """Tokens of the longest row."""
    tokens: int = Field(ge=0, lt=2**40)
    """Of all rows that a client has in flight: more than these at once are refused, or not kept for the backward."""


class PeerRecord(Record):
    """One peer's announcement for one model."""

    peer_id: PeerIdText
    name: Text = Field(default="", max_length=MAX_NAME)
    model: ModelId
    start: int = Field(ge=0)
    end: int = Field(gt=0)
    """Blocks [start, end)."""
    state: PeerState = PeerState.ONLINE
    dtype: Text = Field(max_length=20)
    quantization: Text = Field(max_length=20)
    addresses: tuple[Annotated[Text, Field(max_length=300)], ...] = Field(default=(), max_length=MAX_ADDRESSES)
    direct: Door | None = None
    """None: the peer answers by libp2p only."""
    speed: Speed
    memory: MemoryShares | None = None
    """None: the peer does not say."""
    free_cache_tokens: int = Field(ge=0)
    """Tokens (of one row) that the peer's KV memory could still take."""
    max_length: int = Field(gt=0)
    """Tokens that one session may hold."""
    trainable: Trainable | None = None
    """None: the peer does not say; one that cannot train refuses."""
    sessions: int = Field(default=0, ge=0)
    version: Text = Field(max_length=40)

    @model_validator(mode="after")
    def _span_lies_in_model(self) -> Self:
        if not self.start < self.end <= self.model.num_blocks:
            raise ValueError(f"span {self.start}:{self.end} does not lie in a model of {self.model.num_blocks} blocks")
        return self

    def trains(self, row: int) -> bool:
        """Whether it can train rows of so many tokens, as far as it says."""
        return self.trainable is None or row <= self.trainable.row


class MemberRecord(Record):
    """One process of a private swarm's member, as it announces itself."""

    peer_id: PeerIdText
    member: str = Field(pattern=r"^[0-9a-f]{16}$")
    """The member's short name, see `protocol.membership.certificate`."""
    addresses: tuple[Annotated[Text, Field(max_length=300)], ...] = Field(default=(), max_length=MAX_ADDRESSES)
    """None: it listens nowhere."""
    version: Text = Field(max_length=40)


MAX_SHARED = 8


class SharedModel(Record):
    """A model of which a member gives pieces to others; it may be fetching the rest itself."""

    model: ModelId
    manifest: Sha256
    """See `protocol.weights.manifest`."""
    held: int = Field(ge=0)
    """Bytes of it that are there."""
    wanted: int = Field(ge=0)
    """Bytes that are to be there in the end: `held`, where nothing is being fetched."""
    rate: float = Field(default=0.0, ge=0)
    """Bytes per second that come at present."""


class WeightsRecord(Record):
    """One member's announcement of the models' files that it gives to others."""

    peer_id: PeerIdText
    name: Text = Field(default="", max_length=MAX_NAME)
    models: tuple[SharedModel, ...] = Field(max_length=MAX_SHARED)
    direct: Door | None = None
    """As in `PeerRecord`."""


def holes(peers: Iterable[PeerRecord], start: int, end: int) -> list[range]:
    """The runs of blocks in [start, end) that none of `peers` serves."""
    served = {block for peer in peers for block in range(peer.start, peer.end)}
    missing: list[range] = []
    for block in range(start, end):
        if block in served:
            continue
        if missing and missing[-1].stop == block:
            missing[-1] = range(missing[-1].start, block + 1)
        else:
            missing.append(range(block, block + 1))
    return missing


MAX_ACCUSED = 32


class Accusation(Record):
    """One peer that answered wrongly."""

    peer_id: PeerIdText
    kind: Text = Field(max_length=20)
    """The kind of request that it answered wrongly: forward, backward or step."""


class Complaint(Record):
    """A client's complaint about peers whose answers differed when others computed them again.

    Mere advice: any client can claim anything.
    """

    peer_id: PeerIdText
    """The client's."""
    model: ModelId
    accused: tuple[Accusation, ...] = Field(min_length=1, max_length=MAX_ACCUSED)
