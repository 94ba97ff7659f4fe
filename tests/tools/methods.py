"""Every PEFT method that a swarm must carry, and how to compare a swarm's run of it with a local one."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import client

TARGETS = {
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "gemma2": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
}
TASKS = {
    "CAUSAL_LM": (transformers.AutoModelForCausalLM, client.AutoDistributedModelForCausalLM),
    "SEQ_CLS": (
        transformers.AutoModelForSequenceClassification,
        client.AutoDistributedModelForSequenceClassification,
    ),
    "TOKEN_CLS": (transformers.AutoModelForTokenClassification, client.AutoDistributedModelForTokenClassification),
}
HEADS = ("score", "classifier")
EMBEDDINGS = {"bloom": "word_embeddings", "gpt2": "wte"}


def _lora(family: str, task: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "task_type": task, **options})


def _block(family: str, number: int) -> str:
    return rf".*\.(h|layers)\.{number}\..*"


METHODS: dict[str, Callable[[str, str], peft.PeftConfig]] = {
    "LoRA": _lora,
    "LoRA all-linear": lambda f, t: _lora(f, t, target_modules="all-linear"),
    "LoRA regex": lambda f, t: _lora(f, t, target_modules=rf".*\.[13]\..*\.({'|'.join(TARGETS[f])})"),
    "LoRA patterns": lambda f, t: _lora(
        f, t, rank_pattern={_block(f, 3): 2}, alpha_pattern={_block(f, 1): 5}, exclude_modules=_block(f, 2)
    ),
    "LoRA layers_to_transform": lambda f, t: _lora(f, t, layers_to_transform=[1, 2, 4]),
    "rsLoRA": lambda f, t: _lora(f, t, use_rslora=True),
    "DoRA": lambda f, t: _lora(f, t, use_dora=True),
    "AdaLoRA": lambda f, t: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, target_modules=TARGETS[f], task_type=t
    ),
    "IA3": lambda f, t: peft.IA3Config(target_modules=TARGETS[f], feedforward_modules=TARGETS[f][-1:], task_type=t),
    "VeRA": lambda f, t: peft.VeraConfig(r=8, target_modules=TARGETS[f][:1], task_type=t),
    "LoHa": lambda f, t: peft.LoHaConfig(r=4, target_modules=TARGETS[f], task_type=t),
    "LoKr": lambda f, t: peft.LoKrConfig(r=4, target_modules=TARGETS[f], task_type=t),
    "OFT": lambda f, t: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS[f][:1], task_type=t),
    "prompt tuning": lambda f, t: peft.PromptTuningConfig(num_virtual_tokens=3, task_type=t),
    "P-tuning MLP": lambda f, t: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type=t),
    "P-tuning LSTM": lambda f, t: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", task_type=t
    ),
    "prefix tuning": lambda f, t: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=t),
    "prefix tuning, projection": lambda f, t: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, task_type=t
    ),
    "modules_to_save": lambda f, t: _lora(f, t, modules_to_save=[EMBEDDINGS.get(f, "embed_tokens")]),
    "LoRA on embeddings": lambda f, t: _lora(f, t, target_modules=[*TARGETS[f], EMBEDDINGS.get(f, "embed_tokens")]),
    "PiSSA": lambda f, t: _lora(f, t, init_lora_weights="pissa"),
    # PEFT's OLoRA mistakes GPT-2's layers for their transposes: only square ones run at all. The larger its scaling,
    # the more it leaves to cancel, and the more rounding.
    "OLoRA": lambda f, t: _lora(
        f, t, init_lora_weights="olora", lora_alpha=2, **{"target_modules": ["attn.c_proj"]} if f == "gpt2" else {}
    ),
}


ROUNDED = ("PiSSA", "OLoRA")
"""Equal but for rounding: a peer subtracts from its results what PEFT subtracts from its weights."""
ROUNDING = 1e-5
"""How far apart those may be; what is saved and loaded may be for every method."""


def _options(task: str) -> dict[str, Any]:
    return {} if task == "CAUSAL_LM" else {"num_labels": 3}


@functools.lru_cache(len(TASKS))
def _load_here(path: Path, task: str) -> Any:
    return TASKS[task][0].from_pretrained(path, **_options(task))


def load(path: Path, task: str, initial_peers: list[str] | None) -> Any:
    """The model of a task, on a swarm or (without `initial_peers`) here; new heads are drawn from one seed."""
    if initial_peers is None:
        model = copy.deepcopy(_load_here(path, task))
    else:
        model = TASKS[task][1].from_pretrained(str(path), initial_peers=initial_peers, **_options(task))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of the head: some methods draw random numbers in the blocks, and here they draw none
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in HEADS:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch_for(task: str) -> dict[str, torch.Tensor]:
    """Three rows of twelve tokens, one padded on the left, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = {
        "CAUSAL_LM": ids.masked_fill(mask == 0, -100),
        "SEQ_CLS": torch.tensor([0, 2, 1]),
        "TOKEN_CLS": torch.randint(0, 3, (3, 12), generator=generator),
    }
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[task]}


def adapted(model: Any, config: peft.PeftConfig) -> peft.PeftModel:
    """The adapter on the model, away from its starting point: zeros would hide mistakes."""
    torch.manual_seed(7)
    tuned = peft.get_peft_model(model, copy.deepcopy(config))
    for number, (_, parameter) in enumerate(trainable(tuned)):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return tuned


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def train(model: Any, task: str, method: str, steps: int = 3) -> list[torch.Tensor]:
    """Losses, logits, gradients and parameters of a few optimizer steps, in order."""
    batch, seen = batch_for(task), list[torch.Tensor]()
    parameters = [parameter for _, parameter in trainable(model)]
    # AdamW divides gradients that are nothing but rounding by their own size. After it even two local models, whose
    # weights differ in their last bits, are apart by up to 8e-5.
    optimizer = torch.optim.SGD(parameters, lr=0.02) if method in ROUNDED else torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(steps):
        torch.manual_seed(11)
        output = model(**batch)
        output.loss.backward()
        seen += [output.loss.detach(), output.logits.detach()]
        seen += [parameter.grad.clone() for _, parameter in trainable(model) if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return seen + [parameter.detach().clone() for _, parameter in trainable(model)]


@torch.no_grad()
def logits(model: Any, task: str) -> torch.Tensor:
    """The logits of real tokens."""
    batch = batch_for(task)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return output if task == "SEQ_CLS" else output[:, -8:]


@dataclass(frozen=True)
class Refusal:
    """Why plain PEFT cannot do something, so that there is nothing to equal."""

    reason: str
    errors: tuple[type[Exception], ...]
    """What it raises."""


_CONV1D = Refusal("PEFT has it for `Linear` layers only, and GPT-2's are `Conv1D`.", (TypeError,))
_CLASSIFIER = Refusal("PEFT targets the classifier, and keeps a trainable copy of it too.", (TypeError,))
_VIRTUAL = Refusal("PEFT gives logits to the virtual tokens, which have no labels.", (RuntimeError, ValueError))


def refusal_of(family: str, task: str, method: str) -> Refusal | None:
    """Why this cannot be done without a swarm either; `None` where it can."""
    if family == "gpt2" and method in ("LoHa", "LoKr", "OFT"):
        return _CONV1D
    if task == "TOKEN_CLS" and method == "LoRA all-linear":
        return _CLASSIFIER
    if task == "TOKEN_CLS" and method in ("prompt tuning", "P-tuning MLP", "P-tuning LSTM"):
        return _VIRTUAL
    return None
