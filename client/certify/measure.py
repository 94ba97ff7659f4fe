"""Measuring what wire codecs do to a model: each is applied at the boundaries of spans of a local model.

There, and where gradients come back, the model's tensors are coded and decoded by the very functions that a swarm uses.
Compared with the model as it is: the next token's distribution on a text, and the loss of a short LoRA training with
the same data and the same seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from client.certify.boundaries import Boundaries
from client.certify.certificate import Certificate, Effect, Extent
from client.tokenizer import load_tokenizer, vocabulary_size
from client.tune.data.encode import Encoder
from client.tune.data.files import read_rows
from client.tune.data.formats import Converter
from protocol.errors import BadUsage
from protocol.model.checkpoint import open_checkpoint
from protocol.model.classes import CAUSAL_LM, class_for

PAIRS = {"lossless": "lossless", "f16": "f16", "bf16": "bf16", "int8": "bf16"}
"""Codec of hidden states -> codec of their gradients that is measured along with it."""
_EXACT = "lossless"
_WINDOW, _ROWS = 128, 2
"""Tokens of a row, and rows of a training step."""
_RANK, _LEARNING_RATE = 8, 5e-4


def measure(
    model: str,
    revision: str | None,
    dtype: str,
    device: torch.device,
    data: Path,
    extent: Extent,
    report: Callable[[str], None],
) -> Certificate:
    """Measure every codec on `model` (a folder or hub name) in `dtype` (a name, or auto: the checkpoint's).

    `data`: a file as for `peer tune`. Raises `BadUsage`, `UnsupportedModel`, `torch.OutOfMemoryError`.
    """
    checkpoint = open_checkpoint(model, revision)
    rows = _read_text(load_tokenizer(model, revision), data, vocabulary_size(checkpoint.config)).to(device)
    checkpoint.state_dict(lambda _: True)  # says what is wrong with the files, which Transformers does in many ways
    cls, config = class_for(checkpoint, CAUSAL_LM)
    local = cls.from_pretrained(model, config=config, revision=revision or "main", dtype=dtype).eval().to(device)
    boundaries = Boundaries(local, extent.spans)
    report("the next token's distribution")
    compared = rows[: max(1, extent.tokens // _WINDOW)]
    perplexity, found = _compare(local, boundaries, compared)
    report("LoRA training without a codec")
    loss = _train(local, boundaries, rows, extent.steps, "none", "none")
    effects = []
    for codec, gradients in PAIRS.items():
        after = loss
        if codec != _EXACT:
            report(f"LoRA training with {codec}, gradients {gradients}")
            after = _train(local, boundaries, rows, extent.steps, codec, gradients)
        effects.append(Effect(codec, gradients, **found[codec], loss=after, loss_change=after / loss - 1))
    name = str(local.dtype).removeprefix("torch.")
    measured = replace(extent, tokens=compared.numel())  # whole rows, and no more than the text has
    return Certificate(model, name, measured, perplexity, loss, tuple(effects))


def _read_text(tokenizer: Any, path: Path, vocabulary: int) -> torch.Tensor:
    """The file's records one after the other, in rows of equal length: (rows, tokens)."""
    encoder, convert = Encoder(tokenizer, 2**31 - 1, vocabulary=vocabulary), Converter("auto", {})
    examples = (example for row in read_rows([path]) for example in encoder.encode(convert(row), row.place))
    ids = torch.cat([example.ids for example in examples]).long()
    if len(ids) < _WINDOW:
        raise BadUsage(f"{path} has {len(ids)} tokens, too few to measure anything; give at least {_WINDOW}.")
    return ids[: len(ids) // _WINDOW * _WINDOW].view(-1, _WINDOW)


@torch.no_grad()
def _compare(
    model: PreTrainedModel, boundaries: Boundaries, rows: torch.Tensor
) -> tuple[float, dict[str, dict[str, float]]]:
    """The perplexity as the model is, and by codec what it does to distributions. Row by row: logits are large."""
    plain: list[torch.Tensor] = []
    found: dict[str, list[torch.Tensor]] = {codec: [] for codec in PAIRS}
    sizes: dict[str, float] = {}
    for row in rows[:, None]:
        truth = _log_probabilities(model, row)
        plain.append(_surprise(truth, row))
        for codec, effects in found.items():
            with boundaries.using(codec):
                coded = _log_probabilities(model, row)
            sizes[codec] = boundaries.bytes / boundaries.values
            kl = (truth.exp() * (truth - coded)).sum(-1).mean().clamp(min=0)
            same = (truth.argmax(-1) == coded.argmax(-1)).float().mean()
            effects.append(torch.stack([kl, same, _surprise(coded, row)]))
    effects_of = {codec: torch.stack(effects).mean(0) for codec, effects in found.items()}
    return float(torch.stack(plain).mean().exp()), {
        codec: {
            "bytes_per_value": sizes[codec], "kl": float(kl), "top1": float(top1), "perplexity": float(lost.exp()),
        }
        for codec, (kl, top1, lost) in effects_of.items()
    }  # fmt: skip


def _log_probabilities(model: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary), float32."""
    logits: torch.Tensor = model(input_ids=row, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _surprise(log_probabilities: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Nats per token."""
    return -log_probabilities[:-1].gather(1, row[0, 1:, None]).mean()


def _train(
    model: PreTrainedModel, boundaries: Boundaries, rows: torch.Tensor, steps: int, codec: str, gradients: str
) -> float:
    """The loss at the end of a LoRA training, which leaves the model as it was."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=_LEARNING_RATE)
    losses = []
    with boundaries.using(codec, gradients):
        for step in range(steps):
            ids = rows[[(step * _ROWS + i) % len(rows) for i in range(_ROWS)]]
            loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    tuned.unload()
    return _mean(losses[-max(1, steps // 4) :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
