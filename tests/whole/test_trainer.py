"""The Hugging Face Trainer through a swarm: the figures of plain local PEFT, and adapters that go both ways."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from client import AutoDistributedModelForSequenceClassification, AutoDistributedModelForTokenClassification
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from tests.tools.swarm import Both, Swarm

VOCABULARY, LABELS = 128, 3


@dataclass(frozen=True)
class Run:
    """What a training run reported and left behind."""

    losses: list[float]
    norms: list[float]
    evaluated: float
    folder: Path
    model: Any


def texts() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(3, VOCABULARY, (64, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def batch() -> torch.Tensor:
    return torch.stack([row["input_ids"] for row in texts()[:4]])


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )
    return peft.get_peft_model(model, config)


def train(model: Any, folder: Path, steps: int = 20, resume: Path | None = None, **options: Any) -> Run:
    arguments = {
        "max_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "save_steps": 10, "report_to": [], "seed": 1, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    rows = texts()
    trainer = Trainer(
        model, TrainingArguments(str(folder), **arguments | options), train_dataset=rows, eval_dataset=rows[:8]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    evaluated = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return Run(losses, norms, evaluated, folder, model.eval())


@pytest.fixture(scope="module")
def runs(llamas: Both, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Twenty steps with gradient accumulation: locally, and through the swarm."""
    root = tmp_path_factory.mktemp("runs")
    return train(with_lora(llamas.local()), root / "local"), train(with_lora(llamas.remote()), root / "remote")


def assert_equal(ours: Run, theirs: Run, steps: int) -> None:
    assert ours.losses == theirs.losses
    assert ours.norms == theirs.norms
    assert ours.evaluated == theirs.evaluated
    assert len(ours.losses) == len(ours.norms) == steps


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=batch()).logits  # type: ignore[no-any-return]


def test_twenty_steps_with_gradient_accumulation(runs: tuple[Run, Run]) -> None:
    theirs, ours = runs
    assert_equal(ours, theirs, 20)
    assert sum(ours.losses[-5:]) < sum(ours.losses[:5])
    trained = {name: value for name, value in ours.model.named_parameters() if value.requires_grad}
    for name, value in theirs.model.named_parameters():
        if value.requires_grad:
            assert torch.equal(trained.pop(name), value), name
    assert not trained


def test_gradient_checkpointing(llamas: Both, runs: tuple[Run, Run], tmp_path: Path) -> None:
    ours = train(with_lora(llamas.remote()), tmp_path, 5, gradient_checkpointing=True)
    theirs = train(with_lora(llamas.local()), tmp_path, 5, gradient_checkpointing=True)
    assert_equal(ours, theirs, 5)


def test_an_evaluation_leaves_nothing_on_the_peers(llamas: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are kept for a backward only; under `no_grad` none will come."""
    send, kept = Channel.send, list[bool]()

    async def note(self: Channel, message: Message) -> None:
        if isinstance(message.body, pb.Forward):
            kept.append(message.body.keep)
        await send(self, message)

    monkeypatch.setattr(Channel, "send", note)
    tuned = with_lora(llamas.remote())
    with torch.no_grad():
        tuned(input_ids=batch(), use_cache=False)
    assert kept == [False] * 3
    tuned(input_ids=batch(), use_cache=False)
    assert kept[3:] == [True] * 3


def test_bf16_autocast(llamas: Both, runs: tuple[Run, Run], tmp_path: Path) -> None:
    ours = train(with_lora(llamas.remote()), tmp_path, 5, bf16=True)
    assert_equal(ours, train(with_lora(llamas.local()), tmp_path, 5, bf16=True), 5)
    assert ours.losses[1:] != runs[0].losses[1:5]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_optimizers(optimizer: str, llamas: Both, tmp_path: Path) -> None:
    """Also those that change parameters behind autograd's back."""
    ours = train(with_lora(llamas.remote()), tmp_path, 3, optim=optimizer)
    assert_equal(ours, train(with_lora(llamas.local()), tmp_path, 3, optim=optimizer), 3)


def test_a_trained_adapter_in_plain_peft(runs: tuple[Run, Run], llamas: Both, tmp_path: Path) -> None:
    ours = runs[1].model
    ours.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    plain = peft.PeftModel.from_pretrained(llamas.local(), tmp_path)
    assert torch.equal(logits(plain), logits(ours))
    assert not torch.equal(logits(plain), logits(llamas.local()))


def test_a_plain_adapter_in_the_swarm(runs: tuple[Run, Run], llamas: Both, tmp_path: Path) -> None:
    theirs = runs[0].model
    theirs.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llamas.remote(), tmp_path)
    assert torch.equal(logits(loaded), logits(theirs))


def test_an_adapter_by_transformers_own_methods(llamas: Both, tmp_path: Path) -> None:
    """`add_adapter`, `save_pretrained` and `load_adapter` of the model itself."""
    ours = llamas.remote()
    torch.manual_seed(0)
    ours.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ours.save_pretrained(tmp_path)
    plain = llamas.local()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(ours), logits(plain))


def test_going_on_from_a_checkpoint(runs: tuple[Run, Run], llamas: Both, tmp_path: Path) -> None:
    theirs, ours = runs
    resumed = train(with_lora(llamas.remote()), tmp_path, resume=ours.folder / "checkpoint-10")
    assert resumed.losses == theirs.losses
    assert resumed.norms[-10:] == theirs.norms[-10:]


def test_dropout_comes_back_in_backward(llamas: Both) -> None:
    """Forward and backward see the same dropout masks: the loss changes along a direction as the gradient says."""
    tuned = with_lora(llamas.remote(), lora_dropout=0.3, init_lora_weights=False).train()
    weight = next(p for n, p in tuned.named_parameters() if "layers.2" in n and "lora_A" in n)

    def loss() -> torch.Tensor:
        torch.manual_seed(123)
        return tuned(input_ids=batch(), labels=batch()).loss  # type: ignore[no-any-return]

    loss().backward()
    direction = torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(0.01 * direction)
        above = loss()
        weight.sub_(0.02 * direction)
        slope = (above - loss()) / 0.02
    assert weight.grad is not None
    assert slope.item() == pytest.approx((weight.grad * direction).sum().item(), rel=2e-2)


CLASSIFIERS = {
    "SEQ_CLS": (AutoDistributedModelForSequenceClassification, transformers.AutoModelForSequenceClassification),
    "TOKEN_CLS": (AutoDistributedModelForTokenClassification, transformers.AutoModelForTokenClassification),
}


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_classifiers(task: str, llama_swarm: tuple[Path, Swarm], tmp_path: Path) -> None:
    """The head is trained on this machine, the adapter through the swarm; both are saved, and load in plain PEFT."""
    path, swarm = llama_swarm
    distributed, plain = CLASSIFIERS[task]
    theirs = plain.from_pretrained(path, num_labels=LABELS)
    ours = distributed.from_pretrained(str(path), initial_peers=swarm.initial_peers, num_labels=LABELS)
    ours.score.load_state_dict(theirs.score.state_dict())
    base = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ids = batch()
    labels = ids[:, 0] % LABELS if task == "SEQ_CLS" else ids % LABELS

    def steps(model: Any) -> tuple[list[float], Any]:
        tuned, losses = with_lora(model, task_type=task).train(), []
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, tuned

    (our_losses, our_model), (their_losses, their_model) = steps(ours), steps(theirs)
    assert our_losses == their_losses
    assert our_losses[-1] < our_losses[0]
    assert torch.equal(logits(our_model), logits(their_model))
    our_model.save_pretrained(tmp_path)
    fresh = plain.from_pretrained(path, num_labels=LABELS)
    fresh.load_state_dict(base)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path)), logits(our_model))


def test_trainable_embeddings_without_peft(llamas: Both, tmp_path: Path) -> None:
    """What lies outside of the blocks can be trained directly; its gradient went through all remote blocks."""

    def step(model: Any) -> torch.Tensor:
        model.requires_grad_(False)
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        model(input_ids=batch(), labels=batch()).loss.backward()
        return weight.grad  # type: ignore[no-any-return]

    assert torch.equal(step(llamas.remote()), step(llamas.local()))
