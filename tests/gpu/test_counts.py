"""How often the device is asked for something: that, and not what is computed, is most of a decode step's time there.

The numbers are the pretended GPU's, where fused attention is one operation; on a real one it is a kernel or two.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from peer.adapters.store import AdapterStore
from peer.generation.steps import Step, StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from peer.span.loading import load_span
from peer.span.span import Inputs, Mode
from peer.start.arena_trial import arena_for
from peer.start.joining_trial import find_joiner
from peer.training.call import TrainingCall
from peer.training.trainer import Trainer
from protocol.machine.split_linear import split_linears
from protocol.model.checkpoint import open_checkpoint
from tests.tools.lora import put_lora
from tests.tools.spans import WIDTH, states

BLOCKS = 5
WAIT = "stream.synchronize"
"""For the result."""
LOOK = "aten::_local_scalar_dense"
"""The trunk's own: whether there is padding, or rows are packed."""


class Counts(NamedTuple):
    """What one call has asked for."""

    operations: int
    to_device: int
    to_host: int
    waits: dict[str, int]


class Steps:
    """A whole model as a span, and sessions on it, as a peer runs them."""

    def __init__(self, path: Path, device: torch.device, gpu: Any):
        self.span = load_span(open_checkpoint(str(path)), 0, BLOCKS, dtype=torch.float32, device=str(device))
        split_linears(self.span.model)
        self._memory = CacheMemory(2048, 256, 30.0, arena_for(self.span, 2048))
        self.store = AdapterStore(self.span, 10**8, 64, 10**8)
        self._runner = StepRunner(self.span, self.store, find_joiner(self.span))
        self._gpu = gpu

    def open(self, number: int, mask: torch.Tensor | None = None) -> list[Session]:
        """Sessions, each with another number of tokens."""
        sessions = [Session(self._memory, SpanCache(self.span.config, self.span.blocks)) for _ in range(number)]
        for length, session in enumerate(sessions, 3):
            self._run([session], length, mask)
            session.number = 1
        return sessions

    def decode(self, sessions: list[Session], mask: torch.Tensor | None = None) -> Counts:
        """One token of each, in one pass. The second such pass is counted, as the first may find things out."""
        self._run(sessions, 1, mask)
        return self.count(lambda: self._run(sessions, 1, mask))

    def count(self, work: Callable[[], object]) -> Counts:
        self._gpu.reset()
        work()
        counts = self._gpu.operations()
        copies = [counts.get(f"copy to the {end}", 0) for end in ("device", "host")]
        return Counts(self._gpu.launches(), copies[0], copies[1], self._gpu.waits())

    def _run(self, sessions: list[Session], tokens: int, mask: torch.Tensor | None = None) -> None:
        inputs = [Inputs(states(1, tokens, number), mask) for number in range(len(sessions))]
        mode = Mode(self.span.blocks)
        outcomes = self._runner.run([Step(*pair, mode) for pair in zip(sessions, inputs, strict=True)])
        assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes), outcomes


@pytest.fixture(scope="module")
def steps(models: Callable[[str], Path], device: torch.device) -> Callable[[str, Any], Steps]:
    made = dict[str, Steps]()

    def of(family: str, gpu: Any) -> Steps:
        if family not in made:
            made[family] = Steps(models(family), device, gpu)
        return made[family]

    return of


@torch.no_grad()
def of_transformers(path: Path, device: torch.device, count: Callable[[Callable[[], object]], Counts]) -> Counts:
    """What a decode step of the same model asks for without us."""
    model = transformers.AutoModel.from_pretrained(path).to(device).eval()
    cache = transformers.DynamicCache(config=model.config)
    model(inputs_embeds=torch.randn(1, 3, WIDTH, device=device), past_key_values=cache)
    token = torch.randn(1, 1, WIDTH, device=device)
    return count(lambda: model(inputs_embeds=token, past_key_values=cache))


JOINED = {"llama": 1.5, "mixtral": 1.5, "gemma2": 2.7, "bloom": 4.0, "falcon_alibi": 6.3}
"""Family -> how many times the operations of one session's step eight sessions' take.

Above the goal of 1.5 are those whose attention is no fused kernel but ten operations (soft caps, ALiBi), which each
session's does for itself, as it would alone: on keys of its own length.
"""


@pytest.mark.parametrize("family", JOINED)
def test_operations_and_waits_of_a_decode_step(
    steps: Callable[[str, Any], Steps], models: Callable[[str], Path], device: torch.device, pretended: Any, family: str
) -> None:
    own = steps(family, pretended)
    theirs = of_transformers(models(family), device, own.count)
    one, eight = own.decode(own.open(1)), own.decode(own.open(8))
    assert one.operations <= theirs.operations
    assert eight.operations <= JOINED[family] * one.operations
    assert one.waits == theirs.waits | {WAIT: 1}, "the model's own, and one for the result"
    assert eight.waits[WAIT] == 1
    assert (one.to_device, one.to_host) == (theirs.to_device + 1, theirs.to_host + 1)


def test_a_padded_session(steps: Callable[[str, Any], Steps], pretended: Any) -> None:
    """The trunk looks at a mask, as it does without us."""
    own = steps("llama", pretended)
    sessions = own.open(1)
    mask = torch.ones(1, 5, dtype=torch.long)
    mask[0, 0] = 0
    own.decode(sessions)
    counts = own.count(lambda: own._run(sessions, 1, torch.nn.functional.pad(mask, (0, 1), value=1)))
    assert counts.waits == {LOOK: 1, WAIT: 1}
    assert (counts.to_device, counts.to_host) == (2, 1)


@pytest.mark.parametrize("keeps", [True, False])
def test_copies_and_waits_of_a_training_call(steps: Callable[[str, Any], Steps], pretended: Any, keeps: bool) -> None:
    """One copy each way and call, however many gradients there are."""
    own = steps("llama", pretended)
    adapter = put_lora(own.store, own.span, [f"{i}.self_attn.q_proj" for i in range(BLOCKS)], 4, 1)
    call = TrainingCall(Inputs(states(2, 7, 0)), Mode(own.span.blocks, training=True), adapter, {})
    trainer, made = Trainer(own.span, own.store, 10**9), list[int]()
    least = trainer.footprint.of_checkpoints(call)  # measures, the first time
    trainer.kept.max_bytes = 10**9 if keeps else least
    forward = own.count(lambda: made.append(trainer.forward(call, "me", keep=True)[1]))
    backward = own.count(lambda: trainer.backward_kept(made[0], "me", states(2, 7, 1)))
    again = own.count(lambda: trainer.backward(call, states(2, 7, 1)))
    assert forward == (forward.operations, 1, 1, {LOOK: 1, WAIT: 1})
    assert backward == (backward.operations, 1, 1, {WAIT: 1})
    assert again == (again.operations, 2, 1, {LOOK: 1, WAIT: 1})
