"""Goal: a span that fits a GPU with its KV cache can train a row of 2,048 tokens, whatever else is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client.swarm.loop import LOOP
from peer.adapters.store import AdapterStore
from peer.span.span import Span
from peer.start import assembly
from peer.start.memory import ROW
from peer.start.options import ServeOptions
from peer.start.speed import measure
from peer.training import trainer
from peer.training.trainer import Trainer
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import TooLong
from tests.tools.families import build_small
from tests.tools.lora import lora_manifest
from tests.tools.spans import WIDTH, states
from tests.tools.wire import put

BLOCKS = 3
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = transformers.BloomConfig(**TOKENS, hidden_size=WIDTH, n_layer=BLOCKS, n_head=4)
LINEAR = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def measured_on_a_card(pretended: Any) -> Callable[[Span], Any]:
    """Takes memory away when the span has been loaded: what is left is to it as 24 GB are to BLOOM-176B in nf4."""
    from benchmarks.capacity import Card

    card = Card.as_chosen("BLOOM-176B", "nf4", 24)

    def limited(span: Span) -> Any:
        row = Trainer(span, AdapterStore(span, 0, 0, 0), 0, 0).footprint.of_row(ROW)
        pretended.limit(pretended.bytes_now() + int(row * card.free / card.row_bytes(ROW)))
        return measure(span)

    return limited


def adapter() -> Message:
    """LoRA with dropout on all linear layers."""
    targets = [f"{block}.{path}" for block in range(BLOCKS) for path in LINEAR]
    widths = {LINEAR[0]: (WIDTH, 3 * WIDTH), LINEAR[2]: (WIDTH, 4 * WIDTH), LINEAR[3]: (4 * WIDTH, WIDTH)}
    tensors = []
    for target in targets:
        inputs, outputs = widths.get(target.partition(".")[2], (WIDTH, WIDTH))
        tensors += [torch.ones(2, inputs) / 8, torch.ones(outputs, 2) / 8]
    return put(lora_manifest(targets, 2, 0.5, lora_dropout=0.1), *tensors)


def test_a_row_of_2048_tokens(
    pretended: Any, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.out_of_memory import Table

    model = build_small(tmp_path / "bloom", BLOOM)
    monkeypatch.setattr(assembly, "measure", measured_on_a_card(pretended))
    options = ServeOptions(blocks=f"0:{BLOCKS}", device=str(device), dtype="bfloat16")

    async def train() -> None:
        async with Table(model, options) as table:
            trainable = table.server.record().trainable
            assert trainable is not None
            assert ROW <= trainable.row < 4000
            key = (await table.channel.call(adapter())).body.token
            context = pb.Context(end=BLOCKS, training=True, adapter=key, dropout_seed=3)
            for tokens in (500, 500, 500, ROW):  # what fits as a whole is kept so
                hidden = {"hidden_states": states(1, tokens, 1)}
                kept = (await table.channel.call(Message(pb.Forward(context=context, keep=True), hidden))).body.call_id
            grad = {"grad": states(1, ROW, 2)}
            first = await table.channel.call(Message(pb.Backward(context=context, call_id=kept), grad))
            again = await table.channel.call(Message(pb.Backward(context=context), hidden | grad))
            assert len(first.tensors) == 1 + 2 * len(LINEAR) * BLOCKS
            assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
            with pytest.raises(TooLong, match=r"To train blocks 0:3 with 1 x 5000 tokens takes .* MB of memory"):
                await table.channel.call(
                    Message(pb.Forward(context=context, keep=True), {"hidden_states": states(1, 5000, 1)})
                )

    met: list[bool] = []
    monkeypatch.setattr(trainer, "is_out_of_memory", _noted(met, trainer.is_out_of_memory))
    LOOP.run(train())
    assert not any(met), "all of it was foreseen"


def _noted(met: list[bool], ask: Callable[[BaseException], bool]) -> Callable[[BaseException], bool]:
    def noted(error: BaseException) -> bool:
        met.append(ask(error))
        return met[-1]

    return noted
