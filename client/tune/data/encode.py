"""Text to token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from client.tokenizer import fault_of_text, fault_of_tokens
from client.tune.data.formats import Conversation, Record, Text
from client.tune.data.notes import Notes
from client.tune.data.render import Rendered, Renderer
from client.tune.errors import ConfigError, DataError

IGNORED = -100
_TEXT_PROMPT = 32  # tokens of a text that a sample continues; a text has no question of its own


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to learn from.

    `ids`, `labels`: int32 [length]; a label is its token's id where the loss counts it, else -100 (always so for the
    first token, which nothing predicts, so that sequences packed in one row learn nothing from each other).
    `prompt`: how many tokens stand before the last answer.
    """

    ids: Tensor
    labels: Tensor
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """How many tokens the loss counts."""
        return int((self.labels != IGNORED).sum())

    def cut(self, length: int) -> "Example":
        """Its first `length` tokens."""
        return Example(self.ids[:length].clone(), self.labels[:length].clone(), min(self.prompt, length))


@dataclass
class Encoder:
    """Encodes the records of one run.

    Args:
        tokenizer: a fast one (it must know which characters a token stands for).
        max_length: tokens an example may have.
        train_on: "answers" (the loss counts them and what ends them) or "all".
        too_long: what happens to a longer record.
        system: the system message of conversations that bring none.
        vocabulary: rows of the model's table of embeddings; None: any token will do.
        notes: where to count what a user should know of the data.

    `dropped` counts the records that gave nothing: too long, or without any answer left after truncation.

    Raises:
        ConfigError: the tokenizer is not a fast one, or has several chat templates and no default among them.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train_on: Literal["answers", "all"] = "answers"
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    system: str | None = None
    vocabulary: int | None = None
    notes: Notes = field(default_factory=Notes)
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ConfigError(f"the tokenizer {type(self.tokenizer).__name__} has no fast version, which tuning needs")
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            raise ConfigError(f"the tokenizer has several chat templates and no default: {', '.join(templates)}")
        self._renderer = Renderer(self.tokenizer, self.system, self.notes)

    def encode(self, record: Record, place: str) -> list[Example]:
        """The record's examples: one, or several (one for each answer, or windows of a text file), or none (dropped).

        Raises:
            DataError: the record is too long and `too_long` is "refuse", its template refuses it, it is no text that
                can be written or has tokens that the model lacks, or it takes a message out of a loss on all.
        """
        if self.train_on == "all" and isinstance(record, Conversation) and any(turn.masked for turn in record.turns):
            raise DataError(
                f"{place} takes a message out of the loss, and data.train_on: all counts every token; set it to"
                " answers, or remove the mark"
            )
        rendered = self._renderer.render(record, place)
        examples = [self._tokenize(one, place) for one in rendered]
        if isinstance(record, Text):
            examples = [Example(one.ids, one.labels, min(_TEXT_PROMPT, len(one) // 2)) for one in examples]
            if record.whole_file:
                examples = self._windows(examples[0])
        fitting = [self._fit(example, place) for example in examples]
        kept = [example for example in fitting if example.learned]
        self.dropped += not kept
        answers = sum(len(one.answers) for one in rendered)
        if kept and not isinstance(record, Text) and sum(example.learned for example in kept) <= answers:
            self.notes.count(
                "warning",
                "records with one token an answer or less in the loss: look whether the chat template shows them",
            )
        return kept

    def question(self, text: str, as_chat: bool) -> Tensor:
        """The token ids [length] that ask for an answer to `text`.

        Raises:
            DataError: as `encode`.
        """
        return self._tokenize(self._renderer.question(text, as_chat), "samples.prompts").ids

    def _windows(self, example: Example) -> list[Example]:
        cuts = zip(example.ids.split(self.max_length), example.labels.split(self.max_length), strict=True)
        return [Example(ids, _unpredicted(labels.clone()), min(_TEXT_PROMPT, len(ids) // 2)) for ids, labels in cuts]

    def _fit(self, example: Example, place: str) -> Example:
        if len(example) <= self.max_length:
            return example
        if self.too_long == "refuse":
            raise DataError(
                f"{place} is {len(example)} tokens long, over data.max_length ({self.max_length}); shorten it, raise"
                " data.max_length, or set data.too_long to truncate or drop"
            )
        return example.cut(self.max_length if self.too_long == "truncate" else 0)

    def _tokenize(self, rendered: Rendered, place: str) -> Example:
        if fault := fault_of_text(rendered.text):
            raise DataError(f"{place} {fault}")
        encoded = self.tokenizer(
            rendered.text, add_special_tokens=rendered.add_special, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        once = self._once(ids, offsets)
        ids, offsets = ids[once], offsets[once]
        if fault := fault_of_tokens(self.tokenizer, ids, self.vocabulary):
            raise DataError(f"{place} {fault}")
        inside = _inside(offsets, rendered.answers)
        learned = inside if self.train_on == "answers" else [True] * len(ids)
        labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
        prompt = _tokens_before(offsets, rendered.answers[-1][0]) if rendered.answers else len(ids)
        return Example(
            torch.tensor(ids, dtype=torch.int32), _unpredicted(torch.tensor(labels, dtype=torch.int32)), prompt
        )

    def _once(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> slice:
        """Leaves out a first and a last special token that the text has brought and the tokenizer (which gives its own
        no characters) has added again.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        again = list(ids[:2]) == [bos, bos] and offsets[0] == (0, 0)
        twice = list(ids[-2:]) == [eos, eos] and offsets[-1] == (0, 0)
        return slice(int(again), len(ids) - int(twice))


def _tokens_before(offsets: Sequence[tuple[int, int]], start: int) -> int:
    """How many leading tokens end at or before the character `start`."""
    return next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets))


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens stand for a character of one of the spans (both in order); one that stands for none never does."""
    inside, remaining = [], list(reversed(spans))
    for start, end in offsets:
        while remaining and remaining[-1][1] <= start:
            remaining.pop()
        inside.append(bool(remaining) and end > start and end > remaining[-1][0])
    return inside


def _unpredicted(labels: Tensor) -> Tensor:
    labels[:1] = IGNORED
    return labels
