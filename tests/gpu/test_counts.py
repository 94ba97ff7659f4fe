"""How often the device is asked for something: that, and not what is computed, is most of a decode step's time there.

The numbers are the pretended GPU's, where fused attention is one operation; on a real one it is a kernel or two.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.span.span import Inputs, Mode
from peer.training.call import TrainingCall
from peer.training.trainer import Trainer
from tests.tools.device_counts import BLOCKS, DecodeSteps, count, count_transformers
from tests.tools.lora import put_lora
from tests.tools.spans import states

WAIT = "stream.synchronize"
"""For the result."""
LOOK = "aten::_local_scalar_dense"
"""The trunk's own: whether there is padding, or rows are packed."""
JOINED = {"llama": 1.5, "opt": 1.5, "mixtral": 1.5, "gemma2": 2.7, "bloom": 4.0, "falcon_alibi": 6.3}
"""Family -> how many times the operations of one session's step eight sessions' take, at most.

Above the goal of 1.5 are those whose attention is no fused kernel but ten operations (soft caps, ALiBi), which each
session's does for itself, as it would alone: on keys of its own length.
"""


@pytest.fixture(scope="module")
def steps_of(models: Callable[[str], Path], device: torch.device) -> Callable[[str, Any], DecodeSteps]:
    made = dict[str, DecodeSteps]()
    return lambda family, gpu: made.setdefault(family, DecodeSteps(models(family), device, gpu))


@pytest.mark.parametrize("family", JOINED)
def test_operations_and_waits_of_a_decode_step(
    steps_of: Callable[[str, Any], DecodeSteps],
    models: Callable[[str], Path],
    device: torch.device,
    pretended: Any,
    family: str,
) -> None:
    steps = steps_of(family, pretended)
    theirs = count_transformers(models(family), device, pretended)
    one, eight = steps.count(steps.open(1)), steps.count(steps.open(8))
    assert one.operations <= theirs.operations
    assert eight.operations <= JOINED[family] * one.operations
    assert one.waits == theirs.waits | {WAIT: 1}, "the model's own, and one for the result"
    assert eight.waits[WAIT] == 1
    assert (one.to_device, one.to_host) == (theirs.to_device + 1, theirs.to_host + 1)


def test_a_padded_session(steps_of: Callable[[str, Any], DecodeSteps], pretended: Any) -> None:
    """The trunk looks at a mask, as it does without us."""
    steps = steps_of("llama", pretended)
    counts = steps.count(steps.open(1, padding=1))
    assert counts == (counts.operations, 2, 1, {LOOK: 1, WAIT: 1})


@pytest.mark.parametrize("keeps", [True, False])
def test_copies_and_waits_of_a_training_call(
    steps_of: Callable[[str, Any], DecodeSteps], pretended: Any, keeps: bool
) -> None:
    """One copy each way and call, however many gradients there are."""
    desk = steps_of("llama", pretended).desk
    adapter = put_lora(desk.store, desk.span, [f"{i}.self_attn.q_proj" for i in range(BLOCKS)], 4, 1)
    call = TrainingCall(Inputs(states(2, 7, 0)), Mode(desk.span.blocks, training=True), adapter, {})
    trainer, made = Trainer(desk.span, desk.store, 10**9, 10**10), list[int]()
    least = trainer.footprint.of_checkpoints(call)  # measures, the first time
    trainer.kept.max_bytes = 10**9 if keeps else least
    forward = count(pretended, lambda: made.append(trainer.forward(call, "me", keep=True)[1]))
    backward = count(pretended, lambda: trainer.backward_kept(made[0], "me", states(2, 7, 1)))
    again = count(pretended, lambda: trainer.backward(call, states(2, 7, 1)))
    assert forward == (forward.operations, 1, 1, {LOOK: 1, WAIT: 1})
    assert backward == (backward.operations, 1, 1, {WAIT: 1})
    assert again == (again.operations, 2, 1, {LOOK: 1, WAIT: 1})
