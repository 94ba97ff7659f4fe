"""What wire codecs do to a model, measured on this machine alone: each is applied where spans of blocks would meet.

With n spans hidden states cross the wire n + 1 times: to each span, and from the last one. There, and where gradients
come back, a local model's tensors are coded and decoded by the very functions that a swarm uses. Compared with the
model as it is: the next token's distribution on a text, and the loss of a short LoRA training, same data, same seed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from client.tokenizer import load_tokenizer
from client.tune.data.encode import Encoder
from client.tune.data.files import read_rows
from client.tune.data.formats import Converter
from protocol.codecs import NAMES
from protocol.errors import BadUsage
from protocol.model.anatomy import find_blocks
from protocol.model.checkpoint import open_checkpoint
from protocol.tensors import decode, encode

MAX_KL, MIN_TOP1, MAX_LOSS = 1e-3, 0.99, 0.005
"""What is called safe: nats per token, share of tokens, relative difference of the loss."""
PAIRS = {"lossless": "lossless", "f16": "f16", "bf16": "bf16", "int8": "bf16"}
"""Codec of hidden states -> codec of their gradients that is measured along with it."""
_EXACT = "lossless"
_WINDOW, _ROWS = 128, 2
"""Tokens of a row, and rows of a training step."""
_RANK, _LEARNING_RATE = 8, 5e-4


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    spans: int
    tokens: int
    """Of the text that distributions are compared on."""
    steps: int
    """Of training."""


@dataclass(frozen=True)
class Effect:
    """What one codec does."""

    codec: str
    gradients: str
    bytes_per_value: float
    kl: float
    """Kullback-Leibler divergence of the next token's distribution from the true one, nats, mean over tokens."""
    top1: float
    """Share of tokens whose likeliest successor is the same."""
    perplexity: float
    loss: float
    """Mean of the training's last quarter."""
    loss_change: float
    """Relative."""

    @property
    def excesses(self) -> list[str]:
        """What is not within its threshold; what is no number is not."""
        within = {"KL": self.kl <= MAX_KL, "top-1": self.top1 >= MIN_TOP1, "loss": abs(self.loss_change) <= MAX_LOSS}
        return [name for name, is_within in within.items() if not is_within]

    @property
    def is_safe(self) -> bool:
        """Whether all that was measured is within the thresholds."""
        return not self.excesses


@dataclass(frozen=True)
class Certificate:
    """The result for a model."""

    model: str
    dtype: str
    plan: Plan
    """What was measured."""
    perplexity: float
    loss: float
    effects: tuple[Effect, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, the thresholds and verdicts among them."""
        codecs = [{**asdict(effect), "safe": effect.is_safe} for effect in self.effects]
        limits = {"kl": MAX_KL, "top1": MIN_TOP1, "loss_change": MAX_LOSS}
        whole = {name: value for name, value in asdict(self).items() if name not in ("plan", "effects")}
        return {**whole, **asdict(self.plan), "limits": limits, "codecs": codecs}


def certify(
    model: str, revision: str | None, dtype: str, data: Path, plan: Plan, report: Callable[[str], None]
) -> Certificate:
    """Measure every codec on `model` (a folder or hub name) in `dtype` (a name, or auto: the checkpoint's).

    `data`: a file as for `peer tune`. Raises `BadUsage`, `UnsupportedModel`.
    """
    checkpoint = open_checkpoint(model, revision)
    rows = _read_text(load_tokenizer(model, revision), data)
    checkpoint.state_dict(lambda _: True)  # says what is wrong with the files, which Transformers does in many ways
    local = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=dtype).eval()
    borders = Borders(local, plan.spans)
    report("the next token's distribution")
    compared = rows[: max(1, plan.tokens // _WINDOW)]
    perplexity, found = _compare(local, borders, compared)
    report("LoRA training without a codec")
    loss = _train(local, borders, rows, plan.steps, "none", "none")
    effects = []
    for codec, gradients in PAIRS.items():
        after = loss
        if codec != _EXACT:
            report(f"LoRA training with {codec}, gradients {gradients}")
            after = _train(local, borders, rows, plan.steps, codec, gradients)
        effects.append(Effect(codec, gradients, **found[codec], loss=after, loss_change=after / loss - 1))
    name = str(local.dtype).removeprefix("torch.")
    measured = replace(plan, tokens=compared.numel())  # whole rows, and no more than the text has
    return Certificate(model, name, measured, perplexity, loss, tuple(effects))


class Borders:
    """Codes the hidden states of a local model, and their gradients, where spans of its blocks meet."""

    def __init__(self, model: PreTrainedModel, spans: int):
        blocks = find_blocks(model).of(model)
        if spans > len(blocks):
            raise BadUsage(f"--spans {spans} is more than the model's {len(blocks)} blocks.")
        self._codec = self._gradients = "none"
        self.values = self.bytes = 0
        """That have crossed forward under the codec in use."""
        for number in range(spans):
            blocks[len(blocks) * number // spans].register_forward_pre_hook(self._before, with_kwargs=True)
        blocks[-1].register_forward_hook(self._after)

    @contextmanager
    def using(self, codec: str, gradients: str = "none") -> Iterator[None]:
        """Codes with these inside the block."""
        self._codec, self._gradients, self.values, self.bytes = codec, gradients, 0, 0
        try:
            yield
        finally:
            self._codec = self._gradients = "none"

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._cross(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._cross(kwargs["hidden_states"])}

    def _after(self, block: nn.Module, args: Any, output: Any) -> Any:
        return self._cross(output) if isinstance(output, torch.Tensor) else (self._cross(output[0]), *output[1:])

    def _cross(self, hidden: torch.Tensor) -> torch.Tensor:
        crossed: torch.Tensor = _Crossing.apply(hidden, self)  # type: ignore[no-untyped-call]
        return crossed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as they arrive."""
        entry, data = encode("hidden_states", hidden, NAMES[self._codec])
        self.values, self.bytes = self.values + hidden.numel(), self.bytes + data.nbytes
        return decode([entry], bytearray(data))["hidden_states"].to(hidden.device)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Their gradient as it arrives."""
        entry, data = encode("grad", grad, NAMES[self._gradients])
        return decode([entry], bytearray(data))["grad"].to(grad.device)


class _Crossing(torch.autograd.Function):
    """The way over the wire and, in a backward, back."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, borders: Borders) -> torch.Tensor:
        ctx.borders = borders
        return borders.forward(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.borders.backward(grads[0]), None


def _read_text(tokenizer: Any, path: Path) -> torch.Tensor:
    """The file's records one after the other, in rows of equal length: (rows, tokens)."""
    encoder, convert = Encoder(tokenizer, 2**31 - 1, train_on="all"), Converter("auto", {})
    examples = (example for row in read_rows([path]) for example in encoder.encode(convert(row), row.place))
    ids = torch.cat([example.ids for example in examples]).long()
    if len(ids) < _WINDOW:
        raise BadUsage(f"{path} has {len(ids)} tokens, too few to measure anything; give at least {_WINDOW}.")
    return ids[: len(ids) // _WINDOW * _WINDOW].view(-1, _WINDOW)


@torch.no_grad()
def _compare(model: PreTrainedModel, borders: Borders, rows: torch.Tensor) -> tuple[float, dict[str, dict[str, float]]]:
    """The perplexity as the model is, and by codec what it does to distributions. Row by row: logits are large."""
    plain: list[torch.Tensor] = []
    found: dict[str, list[torch.Tensor]] = {codec: [] for codec in PAIRS}
    sizes: dict[str, float] = {}
    for row in rows[:, None]:
        truth = _log_probabilities(model, row)
        plain.append(_surprise(truth, row))
        for codec, effects in found.items():
            with borders.using(codec):
                coded = _log_probabilities(model, row)
            sizes[codec] = borders.bytes / borders.values
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
    model: PreTrainedModel, borders: Borders, rows: torch.Tensor, steps: int, codec: str, gradients: str
) -> float:
    """The loss at the end of a LoRA training, which leaves the model as it was."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=_LEARNING_RATE)
    losses = []
    with borders.using(codec, gradients):
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
