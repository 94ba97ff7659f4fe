"""A training call, as it has been read."""

from dataclasses import dataclass

from peer.adapters.store import StoredAdapter
from peer.span.span import Inputs, Mode
from protocol.tensors import KvPrefix


@dataclass(frozen=True)
class TrainingCall:
    """What a forward runs on; a backward needs the same again."""

    inputs: Inputs
    mode: Mode
    adapter: StoredAdapter | None
    prefix: KvPrefix
    meets: bool = False
    """Whether it runs where it can meet others (`peer.training.joined`), and so will its backward."""
