"""What a run tells while it goes on: a line of log.jsonl per step and a progress bar."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from client.tune.errors import DivergedError
from client.tune.running.output import replace_file, writing

Line = dict[str, float]


def read_log(path: Path) -> list[Line]:
    """The lines of a log.jsonl, without a last one that a kill cut short."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class RunLog:
    """log.jsonl, written line by line. Lines of steps after `last_step` are removed: they will come again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= last_step]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self._path = path
        with writing(path.name, path.parent):
            self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Appends one line, so that it is on its way to the disk when this returns.

        Raises:
            OutputError: no space is left.
        """
        with writing("a line", self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with writing("a line", self._path):
            self._file.close()


class Recorder(TrainerCallback):
    """Writes the log and draws the progress.

    A line of training has `step`, `epoch`, `loss` (the mean of the steps since the line before), `learning_rate`,
    `grad_norm`, `tokens` (all so far, without padding), `tokens_per_second` and `seconds` (of training since the run
    began, over all its parts); a line of validation `step`, `eval_loss`, `perplexity` and `seconds`.

    Raises:
        DivergedError: the loss or the gradient norm is not a number (before anything of it is saved).
    """

    def __init__(self, log: RunLog, every: int, console: Console) -> None:
        self._log = log
        self._every = every
        self._console = console
        self._bar = _progress_bar(console)
        self._task = self._bar.add_task("tune", total=None, figures="")
        self._tokens, self._seconds, self._clock = 0, 0.0, 0.0  # at the last line; at the last step

    def close(self) -> None:
        """Takes the bar off the screen and closes the log."""
        self._bar.stop()
        self._log.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()
        self._tokens, self._seconds = int(state.num_input_tokens_seen), self._log.seconds
        self._clock = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" in logs:
            self._on_step(state, logs)
        elif "eval_loss" in logs:
            self._on_evaluation(state, logs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock = time.monotonic()  # evaluating is no training time

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock = time.monotonic()

    def _on_step(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise DivergedError(
                    f"the {name} became {logs[name]} at step {state.global_step}; lower trainer.learning_rate or raise"
                    " trainer.warmup and begin again"
                )
        now = time.monotonic()
        self._log.seconds, self._clock = self._log.seconds + now - self._clock, now
        if state.global_step % self._every and state.global_step != state.max_steps:
            self._bar.update(self._task, completed=state.global_step)
            return
        line = self._line(state, logs)
        self._log.write(line)
        self._show(state, line)

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> Line:
        losses = [entry["loss"] for entry in state.log_history[-2 * self._every :] if "loss" in entry]
        count = state.global_step % self._every or self._every
        tokens = int(state.num_input_tokens_seen)
        return {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 4),
            "loss": sum(losses[-count:]) / len(losses[-count:]),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm", 0.0),
            "tokens": tokens,
            "tokens_per_second": self._rate(tokens),
            "seconds": round(self._log.seconds, 3),
        }

    def _rate(self, tokens: int) -> float:
        """Tokens per second since the last line."""
        rate = (tokens - self._tokens) / max(self._log.seconds - self._seconds, 1e-9)
        self._tokens, self._seconds = tokens, self._log.seconds
        return round(rate, 1)

    def _on_evaluation(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        loss = float(logs["eval_loss"])
        perplexity = math.exp(min(loss, 700.0))
        self._log.write(
            {
                "step": state.global_step,
                "eval_loss": loss,
                "perplexity": perplexity,
                "seconds": round(self._log.seconds, 3),
            }
        )
        self._console.print(f"step {state.global_step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def _show(self, state: TrainerState, line: Line) -> None:
        figures = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=state.global_step, figures=figures)
        if not self._console.is_terminal:
            self._console.print(f"step {state.global_step}/{state.max_steps}  {figures}")


def _progress_bar(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, disable=not console.is_terminal)
