"""`transformers.Trainer` with checkpoints that are whole or not there, and evaluations that draw no random numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from client.tune.description.config import TuneConfig
from client.tune.running.checkpoints import CheckpointStore
from client.tune.running.interrupts import InterruptGuard
from client.tune.running.state import RandomState, load_trained, save_trained

_PICKLED = "training_args.bin"  # Trainer's copy of its arguments: a pickle that nothing reads


class TuneTrainer(Trainer):
    """A `Trainer` whose run can be stopped at any moment and continued as if it had not been.

    `store` takes the checkpoints, `guard` holds interrupts back while the state is between two steps.
    """

    def __init__(self, *, model: nn.Module, store: CheckpointStore, guard: InterruptGuard, **trainer: Any) -> None:
        super().__init__(model=model, **trainer)
        self._tuned = model
        self._store = store
        self._guard = guard
        self._between_steps: RandomState | None = None
        self.remove_callback(PrinterCallback)
        self.add_callback(_StepBoundary(self))

    def begin_update(self) -> None:
        """The optimizer is about to change the parameters: no interrupt before `end_update`."""
        self._guard.hold()

    def end_update(self) -> None:
        """Parameters, optimizer, schedule and step count agree again; this is what a checkpoint may hold.

        Raises:
            KeyboardInterrupt: one waited.
        """
        self._between_steps = RandomState()
        self._guard.release()

    def save_last_step(self) -> None:
        """After the training was stopped: saves the last finished step, unless that is saved already, or this run
        finished none, or it was torn out of an update.

        Raises:
            OutputError: the checkpoint can't be written.
        """
        newest = self._store.newest()
        saved = newest is not None and newest[0] == self.state.global_step
        if self._between_steps is None or self._guard.held or saved:
            return
        self._between_steps.restore()
        self._save_checkpoint(self._tuned, trial=None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; but the seed that a data loader draws must not shift the training's dropout."""
        with torch.random.fork_rng(devices=()):  # it is the CPU's generator that is drawn from
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, self.args.output_dir
        self._guard.hold()
        try:
            with self._store.writing(step) as part:
                self.args.output_dir = str(part)
                super()._save_checkpoint(model, trial)
                _flatten(part, part / f"checkpoint-{step}")
                save_trained(self._tuned, part)
        finally:
            self.args.output_dir = folder
        # Not when it failed: that error ends the run, and an interrupt that waited must not take its place.
        self._guard.release()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._tuned, Path(resume_from_checkpoint))


def _flatten(folder: Path, inner: Path) -> None:
    """Trainer makes a folder of its own in the one it is given; its files belong one level up."""
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()
    (folder / _PICKLED).unlink(missing_ok=True)


class _StepBoundary(TrainerCallback):
    """Tells the trainer where a step's update begins and where it is done and written down."""

    def __init__(self, trainer: TuneTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A resumed state brings the intervals of the run as it began; the user may have changed them since.
        state.save_steps, state.eval_steps = int(args.save_steps), int(args.eval_steps or 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.begin_update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" in logs:
            self._trainer.end_update()


class RankAllocation(TrainerCallback):
    """AdaLoRA's own step, between the optimizer's and the clearing of the gradients, which `Trainer` does not take."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step)


def training_arguments(
    config: TuneConfig, folder: Path, steps: int, validated: int, device: torch.device
) -> TrainingArguments:
    """The run's `TrainingArguments`: `steps` optimizer steps on `device`, checkpoints in `folder`, every step logged.

    `validated` rows are validated on; 0: there is no validation.
    """
    trainer = config.trainer
    warm_constant = trainer.schedule == "constant" and trainer.warmup > 0
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=trainer.batch_size,
        # No more than there are: Trainer makes a tensor of that many losses for each batch.
        per_device_eval_batch_size=min(trainer.batch_size, validated or 1),
        gradient_accumulation_steps=trainer.gradient_accumulation,
        learning_rate=trainer.learning_rate,
        lr_scheduler_type="constant_with_warmup" if warm_constant else trainer.schedule,
        warmup_steps=trainer.warmup,
        weight_decay=trainer.weight_decay,
        max_grad_norm=trainer.max_grad_norm,
        seed=trainer.seed,
        data_seed=trainer.seed,
        # Every step: the mean over log_every of them is made from these, so that it is the same after a resume.
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all" if config.data.packing else "non_padding",
        eval_strategy="steps" if validated else "no",
        eval_steps=(trainer.eval_every or steps) if validated else None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=trainer.save_every,
        save_total_limit=None,
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=device.type == "cpu",
        # Rows are gathered from memory: worker processes would only add a fork of a process that runs a network loop.
        dataloader_num_workers=0,
        dataloader_pin_memory=False,  # they are small, and not every machine lets memory be pinned (WSL2)
    )
    # Trainer takes the first GPU there is, and all of them for copies of the model; accelerate asks its own state.
    args.distributed_state.device = args._setup_devices = device  # type: ignore[union-attr, method-assign]
    args._n_gpu = 1
    return args
