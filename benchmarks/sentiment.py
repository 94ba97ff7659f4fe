"""Prompt tuning of a sentiment classifier on 160 sentences of film reviews; 40 are held out.

How wording, learning rates and passes were chosen, and what that means for the accuracy, is in RESULTS.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from benchmarks.corpora import POLARITY
from client import AutoDistributedModelForSequenceClassification
from client.tokenizer import load_tokenizer

LABELS = ("negative", "positive")
TEMPLATE = "Movie review: {}\nThe sentiment of this review is"
INIT_TEXT = "Decide whether the review of a film is positive or negative.\n"
EPOCHS, BATCH = 3, 8
PROMPT_RATE, HEAD_RATE = 1e-3, 3e-3

Example = tuple[str, int]


@dataclass(frozen=True)
class Result:
    """Losses of every step, predictions on the held-out sentences, their accuracy, and that before training."""

    losses: list[float]
    predictions: list[int]
    accuracy: float
    accuracy_before: float


def load_examples() -> tuple[list[Example], list[Example]]:
    """160 to train on and 40 held out, half of each positive; always the same ones."""
    lines = POLARITY.fetch().read_text(encoding="cp1252").splitlines()
    marks = ("__label__neg ", "__label__pos ")
    groups = [[(line.removeprefix(mark).strip(), label) for line in lines if line.startswith(mark)]
              for label, mark in enumerate(marks)]  # fmt: skip
    train, held_out = list[Example](), list[Example]()
    for group in groups:
        order = torch.randperm(len(group), generator=torch.Generator().manual_seed(0)).tolist()
        fifth = len(group) // 5
        held_out += [group[i] for i in order[:fifth]]
        train += [group[i] for i in order[fifth:]]
    return train, held_out


def load_classifier(folder: Path, address: str | None) -> Any:
    """A classifier whose head begins as the language model's own rows of " negative" and " positive"."""
    if address is None:
        kind: Any = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    else:
        kind = AutoDistributedModelForSequenceClassification
        model = kind.from_pretrained(str(folder), initial_peers=[address], num_labels=2, dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder))
    words = [tokenizer(f" {label}").input_ids[0] for label in LABELS]
    with torch.no_grad():
        model.score.weight.copy_(model.get_input_embeddings().weight[words])  # the embeddings are tied
    return model


def with_prompt(model: Any, folder: Path) -> Any:
    """PEFT's prompt tuning, begun from words; PEFT trains the head too."""
    tokens = len(load_tokenizer(str(folder))(INIT_TEXT).input_ids)
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=tokens,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=INIT_TEXT,
        tokenizer_name_or_path=str(folder),
    )
    return peft.get_peft_model(model, config)


class Encoder:
    """Sentences to batches, padded on the left: without input ids, which prompt tuning replaces by embeddings,
    Transformers takes the last position for the last token."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(str(folder))
        self._tokenizer.padding_side = "left"

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        encoded = self._tokenizer([TEMPLATE.format(text) for text, _ in examples], padding=True, return_tensors="pt")
        labels = torch.tensor([label for _, label in examples])
        return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask, "labels": labels}


def fit(model: Any, encode: Encoder, examples: list[Example]) -> list[float]:
    """Trains; the loss of every step."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "score" in name]
    prompt = [p for name, p in model.named_parameters() if p.requires_grad and "score" not in name]
    assert head
    assert prompt
    optimizer = torch.optim.AdamW([{"params": prompt, "lr": PROMPT_RATE}, {"params": head, "lr": HEAD_RATE}])
    steps = EPOCHS * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    generator, losses = torch.Generator().manual_seed(0), list[float]()
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(examples), generator=generator).split(BATCH):
            loss = model(**encode([examples[i] for i in chosen])).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def predict(model: Any, encode: Encoder, examples: list[Example]) -> list[int]:
    """The label of each sentence."""
    batches = (examples[i : i + BATCH] for i in range(0, len(examples), BATCH))
    return [int(label) for batch in batches for label in model(**encode(batch)).logits.argmax(-1)]


def accuracy(predictions: list[int], examples: list[Example]) -> float:
    """The share that is right."""
    return sum(p == label for p, (_, label) in zip(predictions, examples, strict=True)) / len(examples)


def train(folder: Path, address: str | None) -> Result:
    """The whole run, on the swarm at `address` or (without one) here."""
    examples, held_out = load_examples()
    encode = Encoder(folder)
    model = with_prompt(load_classifier(folder, address), folder).eval()
    before = accuracy(predict(model, encode, held_out), held_out)
    losses = fit(model, encode, examples)
    predictions = predict(model, encode, held_out)
    return Result(losses, predictions, accuracy(predictions, held_out), before)
