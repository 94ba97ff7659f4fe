"""A span on the GPU gives what it gives on the CPU: steps, joined steps, training calls; quantized, too."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.span.loading import load_span
from peer.span.span import Inputs, Mode
from peer.start.trial import tolerance
from peer.training.call import TrainingCall
from peer.training.trainer import Trainer
from protocol.model.checkpoint import open_checkpoint
from protocol.model.split_linear import split_linears
from tests.tools.desk import Desk
from tests.tools.device_library import is_loaded
from tests.tools.device_parity import differences, run_all
from tests.tools.spans import END, START, states


@pytest.mark.parametrize(
    ("family", "dtype", "quantization"),
    [
        ("llama", torch.float32, "none"),
        ("bloom", torch.float32, "none"),
        ("falcon_alibi", torch.float32, "none"),
        ("mixtral", torch.float32, "none"),
        ("llama", torch.bfloat16, "nf4"),
        ("llama", torch.bfloat16, "int8"),
        ("bloom", torch.bfloat16, "nf4"),
    ],
)
def test_as_on_the_cpu(
    models: Callable[[str], Path], device: torch.device, family: str, dtype: torch.dtype, quantization: str
) -> None:
    if quantization != "none" and not is_loaded():
        pytest.skip("bitsandbytes' kernels for CPUs are wrong for rows as short as this model's")
    checkpoint = open_checkpoint(str(models(family)))
    found = []
    for where in (str(device), "cpu"):
        span = load_span(checkpoint, START, END, dtype=dtype, device=where, quantization=quantization)
        split_linears(span.model)
        found.append(run_all(span))
    (ours, way), (theirs, other) = found
    assert way == other
    assert way.joiner != "none"
    assert {name: error for name, error in differences(ours, theirs).items() if error > tolerance(span)} == {}


def test_a_call_that_does_not_fit_leaves_nothing(
    models: Callable[[str], Path], device: torch.device, pretended: Any
) -> None:
    span = load_span(open_checkpoint(str(models("llama"))), START, END, device=str(device))
    trainer = Trainer(span, Desk(span).store, 10**9, 10**10)
    call = TrainingCall(Inputs(states(2, 200, 0)), Mode(span.blocks, training=True), None, {})
    trainer.forward(call, "me", keep=False)
    gc.disable()  # nothing may depend on it
    before = pretended.bytes_now()
    pretended.limit(before + 100_000)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.forward(call, "me", keep=True)
    assert pretended.bytes_now() == before
    gc.enable()
