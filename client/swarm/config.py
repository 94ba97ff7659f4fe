"""Options of the network."""

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protocol.errors import BadUsage, first_problem
from protocol.stream import Carrier

Codec = Literal["none", "bf16", "f16", "int8", "lossless"]
"""See `protocol.codecs`; `peer certify` measures what each does to a model."""
GradientCodec = Literal["none", "bf16", "f16", "lossless"]
"""Gradients stay at 16 bits or more."""
_PEER_ID = re.compile(r"Qm[1-9A-HJ-NP-Za-km-z]{44}")


class NetworkOptions(BaseModel):
    """Through which peers, and how: those of a client's options that a fine-tuning run may describe in its file too."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    carrier: Carrier = "auto"
    """How to connect to peers: "direct" (TLS to their own ports), "libp2p", or "auto": directly if that works."""
    allowed_peers: frozenset[str] | None = None
    """IDs of the only peers to go through; None: all."""
    blocked_peers: frozenset[str] = frozenset()
    """IDs of peers never to go through."""
    pins: dict[str, frozenset[str]] = {}
    """Blocks that only certain peers may run: "START:END" -> their IDs. Others' spans are used without these blocks."""
    verify: float = Field(default=0.0, ge=0, le=1)
    """The share of answers that are computed again by other peers, and compared; costs that much more work."""
    codec_out: Codec = "none"
    """How hidden states travel to peers, where these know it: `none` is as they are, the same numbers as locally."""
    codec_back: Codec = "none"
    """How hidden states travel back."""
    codec_gradients: GradientCodec = "none"
    """How the gradients of hidden states travel, both ways."""
    silence_timeout: float = Field(default=10.0, gt=0)
    """Seconds without a sign of life after which a peer counts as lost. Peers at work give one every 2 s."""
    micro_batch_tokens: int = Field(default=1024, gt=0)
    """Training batches of more tokens are split by rows into pieces of about this size, in flight at once."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_none(cls, given: Any) -> Any:
        """An option without a value is one that was not given."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    @field_validator("allowed_peers", "blocked_peers")
    @classmethod
    def _check_peers(cls, peers: frozenset[str] | None) -> frozenset[str] | None:
        _check_ids(peers or ())
        return peers

    @field_validator("pins")
    @classmethod
    def _check_pins(cls, pins: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
        for span, peers in pins.items():
            start, _, end = span.partition(":")
            if not (start.isdecimal() and end.isdecimal() and int(start) < int(end)):
                raise ValueError(f"{span!r} is not a span of blocks; expected START:END, such as 0:2")
            _check_ids(peers)
        return pins


class SwarmConfig(NetworkOptions):
    """How a client uses a swarm. Given whole, or field by field as keyword arguments of `from_pretrained`."""

    model_config = ConfigDict(allow_inf_nan=True)  # seconds without end are an answer here

    initial_peers: tuple[str, ...] = ()
    """Addresses of any members of the swarm: /ip4/…/tcp/…/p2p/…"""
    swarm: str | None = None
    """A private swarm that this machine has joined (`peer join`). None: an open one, if there are `initial_peers`, or
    else the only one that this machine has joined. "open": none of them."""
    discovery: bool = True
    """Whether to look for a private swarm's members on this machine's networks, by multicast DNS."""
    look_up_period: float = Field(default=10.0, gt=0)
    """Seconds for which the directory of peers is taken to be unchanged."""
    max_attempts: int = Field(default=20, gt=0)
    """How often a failed piece of work is tried again on other peers before its error is raised."""
    prefill_chunk_tokens: int = Field(default=512, gt=0)
    """Longer prompts are split into pieces of about this many tokens, which are in flight over all spans at once."""
    hand_over_above: float = Field(default=0.005, ge=0)
    """Seconds of round trip to a peer from which on peers hand their results to each other, without a detour here."""

    @classmethod
    def make(cls, config: "SwarmConfig | None", **options: object) -> "SwarmConfig":
        """The configuration from a whole one or from keyword arguments. Raises `BadUsage`."""
        given = {key: value for key, value in options.items() if value is not None}
        if config is not None and given:
            raise BadUsage(f"Give either a SwarmConfig or {', '.join(given)}, not both.")
        if config is not None:
            return config
        if isinstance(given.get("initial_peers"), str):
            given["initial_peers"] = (given["initial_peers"],)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            field, problem = first_problem(error)
            raise BadUsage(f"Option {field} of the swarm: {problem}.") from error


def _check_ids(peers: Iterable[str]) -> None:
    """A peer's name in place of its ID would match nobody, and keep nothing from anybody."""
    for peer in sorted(peers):
        if not _PEER_ID.fullmatch(peer):
            raise ValueError(f"{peer!r} is not a peer's ID, such as Qm…; `peer status --json` shows them")
