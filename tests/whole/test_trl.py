"""People's own tools, unchanged: TRL, accelerate, Trainer's options and a plain loop, against the same run locally."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from client import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from protocol.errors import BadUsage
from tests.tools.swarm import Both, Swarm
from tests.tools.words import save_tokenizer

VOCABULARY = 128
Figures = list[dict[str, float]]
QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )


def words(source: random.Random, count: int) -> str:
    return " ".join(f"w{source.randrange(3, VOCABULARY)}" for _ in range(count))


def records(*columns: str, count: int = 24) -> Any:
    source = random.Random(0)
    return Dataset.from_list(
        [{column: words(source, source.randint(4, 14)) for column in columns} for _ in range(count)]
    )


def figures(trainer: Trainer) -> Figures:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    timing = "runtime", "per_second", "total_flos", "step_time"
    history = trainer.state.log_history
    return [{key: value for key, value in e.items() if not any(part in key for part in timing)} for e in history]


def assert_equal(ours: Figures, theirs: Figures, steps: int) -> None:
    assert sum("loss" in entry for entry in ours) == steps
    assert all("grad_norm" in entry for entry in ours[:-1] if "loss" in entry)
    assert ours == theirs


TUNING: dict[str, Any] = QUIET | {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
    "save_strategy": "no", "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
SFT: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (("text",), {}),
    "gradient checkpointing": (("text",), {"gradient_checkpointing": True}),
    "TRL's defaults": (("text",), {"gradient_checkpointing": True, "bf16": True}),
    "packing": (("text",), {"packing": True}),
    "packing, wrapped": (("text",), {"packing": True, "packing_strategy": "wrapped", "padding_free": False}),
    "completions only": (("prompt", "completion"), {"completion_only_loss": True}),
}


@pytest.mark.parametrize("variant", SFT)
def test_sft(variant: str, llamas: Both, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    columns, options = SFT[variant]

    def run(model: Any) -> Figures:
        config = trl.SFTConfig(str(tmp_path), max_length=32, **TUNING | options)
        rows = records(*columns, count=48)
        return figures(
            trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
        )

    assert_equal(run(llamas.remote()), run(llamas.local()), 4)


@pytest.mark.parametrize("reference", ["adapter disabled", "adapter as given"])
def test_dpo(reference: str, llamas: Both, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The reference is the model without its adapter or, where it came with one, a frozen copy of that."""

    def run(model: Any) -> Figures:
        config: dict[str, Any] = {"peft_config": lora()}
        if reference == "adapter as given":
            model, config = tuned(model, init_lora_weights=False), {}
        rows = records("prompt", "chosen", "rejected")
        arguments = trl.DPOConfig(str(tmp_path), **TUNING)
        return figures(trl.DPOTrainer(model, None, arguments, train_dataset=rows, processing_class=tokenizer, **config))

    ours = run(llamas.remote())
    assert_equal(ours, run(llamas.local()), 4)
    assert ours[0]["rewards/margins"] == 0  # policy and reference begin equal
    assert ours[3]["rewards/margins"] != 0


def prefer(model: Any, tokenizer: Any, folder: Path) -> Trainer:
    rows = records("prompt", "completion", count=12)
    rows = rows.add_column("label", [number % 2 == 0 for number in range(len(rows))])
    arguments = trl.KTOConfig(str(folder), **TUNING | {"max_steps": 2})
    return trl.KTOTrainer(model, None, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora())


def explore(model: Any, tokenizer: Any, folder: Path) -> Trainer:
    """Generates, with gradient checkpointing on, between its steps; the reference is the disabled adapter."""
    arguments = trl.GRPOConfig(
        str(folder), num_generations=4, max_completion_length=6, beta=0.1,
        **TUNING | {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_checkpointing": True},
    )  # fmt: skip
    return trl.GRPOTrainer(
        model, _reward, arguments, train_dataset=records("prompt"), processing_class=tokenizer, peft_config=lora()
    )


def _reward(completions: list[str], **_columns: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


@pytest.mark.parametrize("make", [prefer, explore])
def test_kto_and_grpo(
    make: Callable[[Any, Any, Path], Trainer], llamas: Both, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def run(model: Any) -> Figures:
        torch.manual_seed(1)
        return figures(make(model, tokenizer, tmp_path))

    ours = run(llamas.remote())
    assert_equal(ours, run(llamas.local()), 2)
    assert ours[0]["grad_norm"] > 0


def test_a_reward_model(llamas: Both, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Its loss is of logits; the new head is trained whole."""

    def run(load: Callable[..., Any], **options: Any) -> Figures:
        torch.manual_seed(1)
        model = load(str(llamas.path), num_labels=1, **options)
        arguments = trl.RewardConfig(str(tmp_path), **TUNING | {"max_steps": 2})
        config = lora(task_type="SEQ_CLS", modules_to_save=["score"])
        rows = records("chosen", "rejected")
        return figures(
            trl.RewardTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
        )

    remote = AutoDistributedModelForSequenceClassification.from_pretrained
    ours = run(remote, initial_peers=llamas.swarm.initial_peers)
    assert_equal(ours, run(transformers.AutoModelForSequenceClassification.from_pretrained), 2)


def test_packing_that_does_not_travel(llama_swarm: tuple[Path, Swarm], models: Callable[[str], Path]) -> None:
    """Positions tell where records begin; a model that does not look at them, or a call without them, is refused."""
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    for family, given in ("llama", None), ("qwen3_next", positions):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            str(models(family)), initial_peers=llama_swarm[1].initial_peers
        )
        with pytest.raises(BadUsage, match="cu_seq_lens_q does not travel"):
            model(ids, position_ids=given, cu_seq_lens_q=ends)


def tuned(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(**options)).train()


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (12, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def test_trainer_with_many_options(llamas: Both, tmp_path: Path) -> None:
    options: dict[str, Any] = QUIET | {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "save_steps": 2, "save_total_limit": 2,
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "label_smoothing_factor": 0.1,
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1,
    }  # fmt: skip

    def run(model: Any, name: str) -> tuple[Figures, Trainer]:
        arguments = TrainingArguments(str(tmp_path / name), **options)
        trainer = Trainer(tuned(model), arguments, train_dataset=batches(), eval_dataset=batches()[:4])
        return figures(trainer), trainer

    (ours, our_trainer), (theirs, their_trainer) = run(llamas.remote(), "remote"), run(llamas.local(), "local")
    assert_equal(ours, theirs, 6)
    assert our_trainer.evaluate()["eval_loss"] == their_trainer.evaluate()["eval_loss"]
    assert our_trainer.state.best_global_step == their_trainer.state.best_global_step
    adapter = peft.get_peft_model_state_dict(our_trainer.model)
    for name, value in peft.get_peft_model_state_dict(their_trainer.model).items():
        assert torch.equal(adapter[name], value), name


def plain_loop(model: Any) -> list[torch.Tensor]:
    """bf16 autocast, no scaler, clipped."""
    model = tuned(model, lora_dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for batch in DataLoader(batches(), batch_size=3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        seen += [loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [p.detach() for p in model.parameters() if p.requires_grad]


def with_accelerate(model: Any) -> list[torch.Tensor]:
    """Everything prepared, gradients accumulated over two batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tuned(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, loader, schedule = accelerator.prepare(
        model, optimizer, DataLoader(batches(), batch_size=2), schedule
    )
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                seen.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
    return seen + [p.detach() for p in accelerator.unwrap_model(model).parameters() if p.requires_grad]


@pytest.mark.parametrize("loop", [plain_loop, with_accelerate])
def test_loops(loop: Callable[[Any], list[torch.Tensor]], llamas: Both) -> None:
    ours, theirs = loop(llamas.remote()), loop(llamas.local())
    assert len(ours) == len(theirs) > 20
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(mine, reference)
