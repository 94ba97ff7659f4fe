"""What a run will do, to be shown before it does it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from client.tune.description.config import DEFAULT_EPOCHS, TrainerConfig, TuneConfig
from client.tune.running.dataset import Prepared, Rows

ExtraRow = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """The size of a run. Tokens are counted over one pass through the data, without padding.

    `rows`: sequences as the model sees them (packed: several records in one). `tokens_per_step`: the mean.
    `widest_batch`: (rows, tokens per row) of the largest micro-batch there can be. `notes`: what of the data is read
    otherwise than it stands there, or not at all, a line for each kind.
    """

    model: str
    method: str
    records: int
    validation_records: int
    dropped: int
    rows: int
    tokens: int
    learned_tokens: int
    longest: int
    trainable_parameters: int
    parameters: int
    steps: int
    epochs: float
    tokens_per_step: float
    widest_batch: tuple[int, int]
    notes: tuple[ExtraRow, ...] = ()
    extra: tuple[ExtraRow, ...] = ()

    def __rich__(self) -> Group:
        """A title and a table of two columns, the caller's extra rows last."""
        table = Table.grid(padding=(0, 2, 0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in (*self._lines(), *self.notes, *self.extra):
            table.add_row(name, Text(value))  # others' names: no markup
        return Group(Text(f"{self.method} on {self.model}", style="table.title"), table)

    def _lines(self) -> list[ExtraRow]:
        dropped = f", {self.dropped:,} dropped" if self.dropped else ""
        share = self.trainable_parameters / self.parameters
        return [
            ("records", f"{self.records:,} to train on, {self.validation_records:,} to validate on{dropped}"),
            ("tokens", f"{self.tokens:,} in {self.rows:,} rows, {self.learned_tokens:,} of them in the loss"),
            ("longest row", f"{self.longest:,} tokens"),
            ("trainable parameters", f"{self.trainable_parameters:,} of {self.parameters:,} ({share:.3%})"),
            ("steps", f"{self.steps:,} ({self.epochs:.2f} epochs), {self.tokens_per_step:,.0f} tokens each"),
        ]


def steps_per_epoch(rows: int, trainer: TrainerConfig) -> int:
    """Optimizer steps of one pass over `rows`, the last one perhaps smaller, as `Trainer` counts them."""
    return math.ceil(math.ceil(rows / trainer.batch_size) / trainer.gradient_accumulation)


def count_steps(rows: int, trainer: TrainerConfig) -> int:
    """Optimizer steps of the whole run."""
    if trainer.steps is not None:
        return trainer.steps
    return math.ceil((trainer.epochs or DEFAULT_EPOCHS) * steps_per_epoch(rows, trainer))


def make_plan(
    config: TuneConfig, prepared: Prepared, parameters: tuple[int, int], extra: Sequence[ExtraRow] = ()
) -> Plan:
    """The plan of a run; `parameters` are (trainable, all), `extra` rows are put below it."""
    trainer, rows = config.trainer, prepared.train
    lengths, learned = _lengths(rows)
    steps, per_epoch = count_steps(len(rows), trainer), steps_per_epoch(len(rows), trainer)
    return Plan(
        model=config.model,
        method=config.adapter.method,
        records=prepared.records,
        validation_records=prepared.validation_records,
        dropped=prepared.dropped,
        rows=len(rows),
        tokens=sum(lengths),
        learned_tokens=learned,
        longest=max(lengths),
        trainable_parameters=parameters[0],
        parameters=parameters[1],
        steps=steps,
        epochs=steps / per_epoch,
        tokens_per_step=sum(lengths) / per_epoch,
        widest_batch=(min(trainer.batch_size, len(rows)), max(lengths)),
        notes=prepared.notes,
        extra=tuple(extra),
    )


def _lengths(rows: Rows) -> tuple[list[int], int]:
    """Tokens of each row, and how many tokens of all rows the loss counts."""
    every = [rows[index] for index in range(len(rows))]
    return [sum(map(len, row)) for row in every], sum(example.learned for row in every for example in row)
