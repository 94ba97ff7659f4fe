"""What a peer counts of the memory that a training call's graph holds is what it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peer.adapters.store import AdapterStore
from peer.span.loading import load_span
from peer.span.span import Inputs, Mode
from peer.training.call import TrainingCall
from peer.training.trainer import Trainer
from protocol.model.checkpoint import open_checkpoint
from tests.tools.lora import put_lora

ROWS, TOKENS = 2, 64
TARGETS = ("1.self_attn.q_proj", "2.mlp.down_proj", "3.self_attn.v_proj")


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_what_is_counted_is_held(
    pretended: Any, device: torch.device, models: Callable[[str], Path], quantization: str, is_adapted: bool
) -> None:
    span = load_span(open_checkpoint(str(models("llama"))), 1, 4, device=str(device), quantization=quantization)
    store = AdapterStore(span, 10**8, 64, 10**8)
    trainer = Trainer(span, store, 10**9, 10**10)
    adapter = put_lora(store, span, TARGETS, 4, 1) if is_adapted else None
    hidden = torch.randn(ROWS, TOKENS, span.hidden_size, device=device)
    call = TrainingCall(Inputs(hidden), Mode(span.blocks, training=True, dropout_seed=7), adapter, {})
    trainer.footprint.of(call)  # measures, and makes what lasts: rotary tables, module trees
    before = pretended.bytes_now()
    result, _ = trainer.forward(call, "me", keep=True)
    del result
    held = pretended.bytes_now() - before
    kept = next(iter(trainer.kept._kept.values()))
    # The result is held by the graph's owner, whether an operation saves it or not.
    assert kept.size == pytest.approx(held, abs=2 * hidden.nbytes), (kept.size, held)
    assert trainer.footprint.of(call) == pytest.approx(held, rel=0.02, abs=2 * hidden.nbytes)
