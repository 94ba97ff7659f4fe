"""The rows of a run: read, encoded, split in training and validation, packed; and the batches made of them."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from client.tune.data.encode import IGNORED, Encoder, Example
from client.tune.data.files import read_rows
from client.tune.data.formats import Conversation, Converter, Record
from client.tune.data.packing import BatchRow, pack
from client.tune.description.config import TuneConfig
from client.tune.errors import DataError


class Rows(Dataset[BatchRow]):
    """Rows of one or (packed) several examples, all in memory: 8 bytes a token."""

    def __init__(self, rows: Sequence[BatchRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> BatchRow:
        return self._rows[index]

    def fingerprint(self) -> str:
        """SHA-256 over every id and label in order: the same data, split and packing give the same."""
        digest = hashlib.sha256()
        for row in self._rows:
            for example in row:
                digest.update(len(example).to_bytes(8, "little"))
                digest.update(example.ids.numpy().tobytes())
                digest.update(example.labels.numpy().tobytes())
            digest.update(b"row")
        return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and is measured on.

    `records` and `validation_records` count records as read, without the `dropped` ones; `prompts` are the token ids
    [length] of the samples; `notes` say, for the plan, what of the data is read otherwise than it stands there.
    """

    train: Rows
    validation: Rows | None
    records: int
    validation_records: int
    dropped: int
    prompts: tuple[Tensor, ...]
    max_length: int
    notes: tuple[tuple[str, str], ...] = ()


class Collator:
    """Rows to a batch, padded to the longest row.

    Not packed: `input_ids`, `labels`, `attention_mask`, int64 [batch, length]. Packed: `position_ids` in place of the
    mask, because Transformers keeps sequences apart only without a mask; the padding is a sequence of its own.
    `pad` may be any id: padding is unlabelled, and masked or kept apart.
    """

    def __init__(self, packing: bool, pad: int) -> None:
        self._packing = packing
        self._pad = pad

    def __call__(self, rows: Sequence[BatchRow]) -> dict[str, Tensor]:
        ids = [torch.cat([example.ids for example in row]).long() for row in rows]
        labels = [torch.cat([example.labels for example in row]).long() for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        width = batch["input_ids"].shape[1]
        if self._packing:
            batch["position_ids"] = torch.stack([_positions(row, width) for row in rows])
        else:
            lengths = torch.tensor([len(row_ids) for row_ids in ids])
            batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return batch


def _positions(row: BatchRow, width: int) -> Tensor:
    lengths = [len(example) for example in row]
    return torch.cat([torch.arange(length) for length in (*lengths, width - sum(lengths))])


def prepare(
    config: TuneConfig, tokenizer: PreTrainedTokenizerBase, context: int | None, vocabulary: int | None = None
) -> Prepared:
    """Reads and encodes the data of a run. Needs the model's tokenizer, not the model.

    Args:
        config: the run.
        tokenizer: the model's.
        context: how many tokens the model reads (`max_position_embeddings`), None where it sets no limit.
        vocabulary: rows of the model's table of embeddings; None: not known, and tokens are not checked against it.

    Raises:
        ConfigError: data.max_length exceeds the context.
        DataError: a file can't be used or has tokens that the model lacks, or nothing is left to learn from or to
            validate on.
    """
    data, max_length = config.data, config.max_length(context)
    encoder = Encoder(tokenizer, max_length, data.train_on, data.too_long, data.system, vocabulary)
    groups, as_chat = _encode(data.path, config, encoder)
    if isinstance(data.validation, Path):
        held_out, _ = _encode([data.validation], config, encoder)
    else:
        groups, held_out = _split(groups, data.validation, config.trainer.seed)
    train = _rows(groups, config, max_length)
    return Prepared(
        train=train,
        validation=_rows(held_out, config, max_length) if held_out else None,
        records=len(groups),
        validation_records=len(held_out),
        dropped=encoder.dropped,
        prompts=_prompts(config, encoder, held_out or groups, as_chat),
        max_length=max_length,
        notes=encoder.notes.lines(),
    )


def _encode(paths: Sequence[Path], config: TuneConfig, encoder: Encoder) -> tuple[list[list[Example]], bool]:
    """Each record's examples, and whether the records are conversations. A text file's windows count as records."""
    convert = Converter(config.data.format, config.data.columns, encoder.notes)
    groups: list[list[Example]] = []
    record: Record | None = None
    for row in read_rows(paths):
        record = convert(row)
        examples = encoder.encode(record, row.place)
        groups += [[example] for example in examples] if row.whole_file else [examples] if examples else []
    if not groups:
        raise DataError(f"{paths[0]}: every record was dropped: none fits in {encoder.max_length} tokens")
    return groups, isinstance(record, Conversation)


def _split(groups: list[list[Example]], share: float, seed: int) -> tuple[list[list[Example]], list[list[Example]]]:
    if share == 0:
        return groups, []
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise DataError(f"data.validation: {share} of {len(groups)} records leaves none to train on; give more records")
    held = set(random.Random(seed).sample(range(len(groups)), count))
    return (
        [group for index, group in enumerate(groups) if index not in held],
        [groups[index] for index in sorted(held)],
    )


def _rows(groups: Sequence[list[Example]], config: TuneConfig, max_length: int) -> Rows:
    examples = [example for group in groups for example in group]
    return Rows(pack(examples, max_length) if config.data.packing else [[example] for example in examples])


def _prompts(
    config: TuneConfig, encoder: Encoder, groups: Sequence[list[Example]], as_chat: bool
) -> tuple[Tensor, ...]:
    if config.samples.prompts:
        return tuple(encoder.question(text, as_chat) for text in config.samples.prompts)
    last = (group[-1] for group in groups[: config.samples.count])
    return tuple(example.ids[: example.prompt] for example in last if example.prompt)
