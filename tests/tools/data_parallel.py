"""What `tests/whole/test_data_parallel.py` has torchrun and accelerate run: a process that trains along with others.

    data_parallel MODEL ADDRESS FOLDER SCENARIO...

Each scenario runs on the plain model and through the swarm that ADDRESS is a member of. What came out lies in
FOLDER/RANK.json: scenario -> ["local" figures, "remote" figures].
"""

import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
import trl
from accelerate import Accelerator
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from client import AutoDistributedModelForCausalLM
from tests.tools.words import save_tokenizer

VOCABULARY = 128
Figures = dict[str, list[float]]
QUIET: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 1, "bf16": False,
}  # fmt: skip
ZERO_2 = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def tuned(model: Any, **options: Any) -> Any:
    torch.manual_seed(dist.get_rank())  # adapters that differ, until the first process's reach the others
    return peft.get_peft_model(model, lora(**{"init_lora_weights": False} | options))


def values(model: Any) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).tolist()


def loop(model: Any, folder: Path, adapter: dict[str, Any], accumulate: int = 2, **options: Any) -> Figures:
    """A plain loop: each process has its own rows."""
    model = tuned(model, **adapter)
    wrapped = DistributedDataParallel(model, **options).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = torch.randint(3, VOCABULARY, (4, 2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses, gradients = list[float](), list[float]()
    for number, ids in enumerate(rows):
        is_last = (number + 1) % accumulate == 0
        with nullcontext() if is_last else wrapped.no_sync():
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        losses.append(loss.item())
        if is_last:
            gradients += torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).tolist()
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


class Unused(torch.nn.Module):
    """A model of the user's own around the swarm's, with a weight that no loss reaches."""

    def __init__(self, model: Any):
        super().__init__()
        self.inner = model
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]


def unused(model: Any, folder: Path) -> Figures:
    model = Unused(tuned(model))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True).train()
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    loss = wrapped(ids)
    loss.backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "lora" in name]
    return {"losses": [loss.item()], "gradients": torch.cat([p.grad.flatten() for p in trained]).tolist()}


def figures(trainer: Trainer, resume: Path | None = None) -> Figures:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in entries],
        "norms": [entry["grad_norm"] for entry in entries],
        "trained": values(trainer.model),
    }


def trainer(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Figures:
    """`Trainer` with two checkpoints; `resume`: one to go on from."""
    rows = torch.randint(3, VOCABULARY, (64, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    arguments = TrainingArguments(str(folder), save_steps=2, gradient_checkpointing=True, **QUIET | options)
    model = tuned(model, init_lora_weights=True, use_dora=True)
    return figures(Trainer(model, arguments, train_dataset=data), resume)


def resumed(model: Any, folder: Path, before: str, **options: Any) -> Figures:
    return trainer(model, folder, folder.with_name(before) / "checkpoint-2", **options)


def sft(model: Any, folder: Path) -> Figures:
    tokenizer = save_tokenizer(folder / str(dist.get_rank()), VOCABULARY)
    source = random.Random(0)
    texts = [" ".join(f"w{source.randrange(3, VOCABULARY)}" for _ in range(source.randint(4, 14))) for _ in range(48)]
    config = trl.SFTConfig(str(folder), max_length=32, save_strategy="no", **QUIET)
    return figures(
        trl.SFTTrainer(
            model, config, train_dataset=Dataset.from_list([{"text": text} for text in texts]),
            processing_class=tokenizer, peft_config=lora(use_dora=True),
        )
    )  # fmt: skip


def accelerator(model: Any, folder: Path) -> Figures:
    """accelerate's own loop."""
    model = tuned(model, init_lora_weights=True, use_dora=True)
    helper = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rows = torch.randint(3, VOCABULARY, (32, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    wrapped, optimizer, loader = helper.prepare(model, optimizer, DataLoader(rows, batch_size=2))
    losses, norms = list[float](), list[float]()
    for ids in loader:
        with helper.accumulate(wrapped):
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
            helper.backward(loss)
            if helper.sync_gradients:
                norms.append(helper.clip_grad_norm_(wrapped.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        losses += helper.gather(loss.detach()).tolist()
    return {"losses": losses, "norms": norms, "trained": values(helper.unwrap_model(wrapped))}


SCENARIOS: dict[str, Callable[[Any, Path], Figures]] = {
    "loop": partial(loop, adapter={}),
    "static graph": partial(loop, adapter={}, accumulate=1, static_graph=True),
    "PiSSA": partial(loop, adapter={"init_lora_weights": "pissa_niter_2"}),
    "unused": unused,
    "trainer": trainer,
    "resumed": partial(resumed, before="trainer"),
    "DeepSpeed": partial(trainer, deepspeed=ZERO_2),
    "DeepSpeed resumed": partial(resumed, before="DeepSpeed", deepspeed=ZERO_2),
    "sft": sft,
    "accelerator": accelerator,
}


def main() -> None:
    path, address, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    kinds: dict[str, Callable[[], Any]] = {
        "local": lambda: AutoModelForCausalLM.from_pretrained(path),
        "remote": lambda: AutoDistributedModelForCausalLM.from_pretrained(path, initial_peers=[address]),
    }
    found = {
        name: [SCENARIOS[name](make(), Path(folder, kind, name)) for kind, make in kinds.items()] for name in names
    }
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
