"""A training call, as it has been read."""

from dataclasses import dataclass, replace

from peer.adapters.store import StoredAdapter
from peer.span.span import Inputs, Mode, Span
from peer.span.transfer import prefix_on
from protocol.tensors import KvPrefix


@dataclass(frozen=True)
class TrainingCall:
    """What a forward runs on; a backward needs the same again. As it came: in this process's memory."""

    inputs: Inputs
    mode: Mode
    adapter: StoredAdapter | None
    prefix: KvPrefix
    meets: bool = False
    """Whether it runs where it can meet others (`peer.training.joined`), and so will its backward."""

    def on(self, span: Span) -> "TrainingCall":
        """The same with hidden states and prefix on a span's device, of its dtype: to be run."""
        inputs, prefix = self.inputs.on(span.device, span.dtype), prefix_on(self.prefix, span.device, span.dtype)
        return replace(self, inputs=inputs, prefix=prefix)
