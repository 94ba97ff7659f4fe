"""What is asked of the pretended GPU: operations, copies and waits of one call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from peer.span.loading import load_span
from protocol.model.checkpoint import open_checkpoint
from protocol.model.split_linear import split_linears
from tests.tools.desk import Desk, Talk
from tests.tools.spans import states

BLOCKS = 5
"""Of a small model."""


class Counts(NamedTuple):
    """What one call has asked for."""

    operations: int
    to_device: int
    """Copies."""
    to_host: int
    waits: dict[str, int]


def count(gpu: Any, work: Callable[[], object]) -> Counts:
    """`gpu`: see `pretended_gpu/device.pyi`."""
    gpu.reset()
    work()
    counts = gpu.operations()
    to_device, to_host = (counts.get(f"copy to the {end}", 0) for end in ("device", "host"))
    return Counts(gpu.launches(), to_device, to_host, gpu.waits())


class DecodeSteps:
    """A whole small model as a span on the GPU, and sessions on it."""

    def __init__(self, model: Path, device: torch.device, gpu: Any):
        span = load_span(open_checkpoint(str(model)), 0, BLOCKS, dtype=torch.float32, device=str(device))
        split_linears(span.model)
        self.desk, self._gpu = Desk(span), gpu

    def open(self, number: int, padding: int = 0) -> list[Talk]:
        """Sessions, each with another number of tokens."""
        talks = [self.desk.open(padding) for _ in range(number)]
        for length, talk in enumerate(talks, 3):
            self._run([talk], length)
        return talks

    def count(self, talks: list[Talk]) -> Counts:
        """Of one token of each, in one pass. It is the second such pass, as the first may find things out."""
        self._run(talks, 1)
        return count(self._gpu, lambda: self._run(talks, 1))

    def _run(self, talks: list[Talk], tokens: int) -> None:
        outcomes = self.desk.run(*(self.desk.step(talk, states(1, tokens, n)) for n, talk in enumerate(talks)))
        assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes


@torch.no_grad()
def count_transformers(model: Path, device: torch.device, gpu: Any) -> Counts:
    """Of a decode step of the same model without us."""
    plain = transformers.AutoModel.from_pretrained(model).to(device).eval()
    cache = transformers.DynamicCache(config=plain.config)
    width = plain.get_input_embeddings().embedding_dim
    plain(inputs_embeds=torch.randn(1, 3, width, device=device), past_key_values=cache)
    token = torch.randn(1, 1, width, device=device)
    return count(gpu, lambda: plain(inputs_embeds=token, past_key_values=cache))
