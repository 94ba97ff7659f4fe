"""The run: a description, a model, its tokenizer and the prepared data, trained by `Trainer`.

config = load_config(Path("tune.yaml"))
check_output(config, resume)
prepared = prepare(config, tokenizer, context_length(model_config), vocabulary_size(model_config))
run = TuneRun(config, model, tokenizer, prepared, resume=resume)
console.print(run.plan(extra=[("peers", "3")]))
result = run.train(console)
"""

import contextlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from client.tokenizer import vocabulary_size
from client.tune.data.packing import check_packing
from client.tune.description.config import TuneConfig
from client.tune.description.peft_methods import attach, peft_config
from client.tune.errors import ConfigError, Interrupted, OutputError, TuneError
from client.tune.running.checkpoints import CheckpointStore
from client.tune.running.dataset import Collator, Prepared
from client.tune.running.interrupts import InterruptGuard
from client.tune.running.output import RunFolder, replace_file, replacing_folder
from client.tune.running.plan import ExtraRow, Plan, count_steps, make_plan
from client.tune.running.plot import plot_losses
from client.tune.running.progress import Line, Recorder, RunLog, read_log
from client.tune.running.samples import generate_samples, samples_markdown
from client.tune.running.state import load_trained
from client.tune.running.trainer import RankAllocation, TuneTrainer, training_arguments
from protocol.errors import first_line
from protocol.machine.terminal import new_console

_ENDS = 10
"""Lines of the log whose mean says where the loss began, and where it ended: a single batch says little."""


@dataclass(frozen=True)
class TuneResult:
    """How a run ended. `loss_before`, `loss_after`: means over its first and its last lines of log.jsonl, up to ten
    and half of them. Validation losses are None without validation data; seconds are those of training alone.
    """

    adapter: Path
    steps: int
    loss_before: float
    loss_after: float
    validation_before: float | None
    validation_after: float | None
    seconds: float

    def __str__(self) -> str:
        return f"loss {self.loss_before:.3f} to {self.loss_after:.3f} in {self.steps} steps ({self.seconds:.0f} s)"


def check_output(config: TuneConfig, resume: bool) -> None:
    """Makes sure, before anything costly, that the run can be written and (without `resume`) that none lies there.

    Raises:
        OutputError: it can't, or one does.
        ConfigError: TensorBoard is wanted and not installed.
    """
    if config.trainer.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("trainer.tensorboard needs the package tensorboard; pip install tensorboard")
    RunFolder(config.output).check(resume)


class TuneRun:
    """One run of `model`, which gets the adapter put into it.

    Args:
        config: the run.
        model: any Transformers causal language model, with its weights here or elsewhere.
        tokenizer: the model's.
        prepared: the data, from `dataset.prepare`.
        resume: go on from the newest whole checkpoint in the output folder (from the start if there is none).
        resume_command: how the user goes on after an interrupt, for the message.

    Raises:
        ConfigError: the adapter does not go on this model, packing does not go with it, or the run to be resumed is
            another one or has done more steps than are asked for.
        OutputError: the output folder can't be used.
    """

    def __init__(
        self,
        config: TuneConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prepared: Prepared,
        *,
        resume: bool = False,
        resume_command: str = "the same command and --resume",
    ) -> None:
        self._config, self._tokenizer, self._prepared = config, tokenizer, prepared
        self._resume_command = resume_command
        self.steps = count_steps(len(prepared.train), config.trainer)
        self.folder = RunFolder(config.output)
        self.folder.check(resume)
        if config.data.packing:
            check_packing(model)
        # The seed is set here too: the adapter's first values are the same in a run and in its continuation.
        set_seed(config.trainer.seed)
        self.model: PeftModel = attach(model, peft_config(config.adapter, config.model, self.steps, config.revision))
        self.folder.check_same(config, prepared.train.fingerprint())
        self._store = CheckpointStore(self.folder.checkpoints, config.trainer.keep_checkpoints)
        self._start = self._store.newest()
        if self.first_step > self.steps:
            raise ConfigError(
                f"the run in {config.output} has done {self.first_step} steps and can't go back to {self.steps}; ask"
                f" for at least {self.first_step} (trainer.steps or trainer.epochs), or name another output"
            )
        self._guard = InterruptGuard()

    @property
    def first_step(self) -> int:
        """Steps already done by the run that this one continues."""
        return self._start[0] if self._start else 0

    def plan(self, extra: Sequence[ExtraRow] = ()) -> Plan:
        """What the run will do; `extra` rows are put below it."""
        return make_plan(self._config, self._prepared, self.model.get_nb_trainable_parameters(), extra)

    def begin(self) -> None:
        """Writes down in the output folder what this run is; from then on the folder belongs to it."""
        self.folder.begin(self._config, self._prepared.train.fingerprint())

    def train(self, console: Console | None = None) -> TuneResult:
        """Trains, saves the adapter, plots the losses, writes the samples.

        Raises:
            Interrupted: Ctrl-C; the last finished step is saved, and the text says how to go on.
            DivergedError: the loss or the gradient is not a number.
            OutputError: something can't be written; the newest whole checkpoint is untouched.
            Exception: whatever the model raised; the last finished step is saved.
        """
        console = console or new_console()
        self.begin()
        self._store.discard_after(self.first_step)
        if self._start and self.first_step == self.steps:
            load_trained(self.model, self._start[1])
        else:
            self._train(console)
        with replacing_folder(self.folder.adapter) as part:
            self.model.save_pretrained(str(part))
        lines = read_log(self.folder.log)
        replace_file(self.folder.plot, plot_losses(lines))
        self._write_samples()
        return self._result(lines)

    def _train(self, console: Console) -> None:
        # Of a model that sees as well it is its language model's configuration that has it.
        use_cache = getattr(self.model.config, "use_cache", None)
        recorder = Recorder(RunLog(self.folder.log, self.first_step), self._config.trainer.log_every, console)
        trainer = self._trainer(recorder)
        with self._guard:
            try:
                trainer.train(resume_from_checkpoint=str(self._start[1]) if self._start else None)
            except KeyboardInterrupt:
                with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C, which came while this was saved
                    trainer.save_last_step()
                raise Interrupted(self._how_to_go_on()) from None
            except TuneError:
                raise
            except Exception:
                # Whatever it was (peers gone, say): the work up to here is not lost with it.
                with contextlib.suppress(OutputError):
                    trainer.save_last_step()
                raise
            finally:
                recorder.close()
                self.model.config.use_cache = use_cache

    def _trainer(self, recorder: Recorder) -> TuneTrainer:
        data, config = self._prepared, self._config
        validated = 0 if data.validation is None else len(data.validation)
        args = training_arguments(config, self.folder.checkpoints, self.steps, validated, self.model.device)
        args.eval_on_start = validated > 0 and self._start is None
        callbacks: list[object] = [recorder]
        if config.adapter.method == "adalora":
            callbacks.append(RankAllocation())
        if config.trainer.tensorboard:
            callbacks.append(self._tensorboard())
        return TuneTrainer(
            store=self._store,
            guard=self._guard,
            model=self.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=Collator(config.data.packing, self._pad()),
            callbacks=callbacks,
        )

    def _pad(self) -> int:
        """The tokenizer's, unless the model has no embedding for it: any id that can be looked up will do."""
        pad = self._tokenizer.pad_token_id
        return pad if pad is not None and pad < vocabulary_size(self.model.config) else 0

    def _tensorboard(self) -> TensorBoardCallback:
        from torch.utils.tensorboard import SummaryWriter

        return TensorBoardCallback(SummaryWriter(str(self.folder.tensorboard)))

    def _how_to_go_on(self) -> str:
        newest = self._store.newest()
        if newest is None:
            return f"stopped before the first step of {self.steps} was done; begin again with {self._resume_command}"
        return (
            f"stopped after step {newest[0]} of {self.steps}, which is saved in {newest[1]}; go on with"
            f" {self._resume_command}"
        )

    def _write_samples(self) -> None:
        samples = self._config.samples
        try:
            made = generate_samples(self.model, self._tokenizer, self._prepared.prompts, samples.max_new_tokens)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped while writing samples; the adapter is done, in {self.folder.adapter}") from None
        except ValueError as error:  # Transformers' for what a generation cannot be
            raise ConfigError(
                f"no samples: the model's generation_config.json asks for what cannot be done here"
                f" ({first_line(error)}); the adapter is done, in {self.folder.adapter}"
            ) from error
        text = samples_markdown(self._config.model, self.steps, made)
        replace_file(self.folder.samples, text.encode())

    def _result(self, lines: Sequence[Line]) -> TuneResult:
        losses = [line["loss"] for line in lines if "loss" in line]
        ends = min(_ENDS, (len(losses) + 1) // 2)
        validation = [line["eval_loss"] for line in lines if "eval_loss" in line]
        return TuneResult(
            adapter=self.folder.adapter,
            steps=self.steps,
            loss_before=_mean(losses[:ends]),
            loss_after=_mean(losses[-ends:]),
            validation_before=validation[0] if validation else None,
            validation_after=validation[-1] if validation else None,
            seconds=lines[-1]["seconds"] if lines else 0.0,
        )


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses) if losses else math.nan
