"""What the tests of `client.tune` share: a tiny random llama, a tokenizer for it, data and descriptions of runs."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from client.tune.description.config import TuneConfig
from client.tune.running.dataset import prepare
from client.tune.running.run import TuneRun
from protocol.model.anatomy import context_length

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(SPECIAL)
CONTEXT = 256


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte: every character of a test can be counted."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = template
    return fast


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Three random blocks, large enough weights that what one token says shows in the next."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=257,
        )
    )


WORDS = ("ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx")
ALPACA = [
    {"instruction": f"Say {word}", "input": "" if index % 2 else "now", "output": word * (1 + index % 3)}
    for index, word in enumerate(WORDS)
]


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def describe(folder: Path, **sections: Any) -> TuneConfig:
    """A short run on ALPACA with dropout (so that random numbers matter); `sections` replace keys of its sections."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model": "tiny",
        "output": str(folder / "out"),
        "data": {"path": [str(folder / "data.jsonl")]},
        "adapter": {"method": "lora", "r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]},
        "trainer": {"steps": 8, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "save_every": 3},
        "samples": {"count": 1, "max_new_tokens": 3},
    }
    for name, section in sections.items():
        replaces = not isinstance(section, dict) or name == "adapter"
        values[name] = section if replaces else {**values[name], **section}
    if not (folder / "data.jsonl").exists():
        write_jsonl(folder / "data.jsonl", ALPACA)
    return TuneConfig.model_validate(values)


def start(config: TuneConfig, *, resume: bool = False) -> TuneRun:
    """A run of a fresh tiny llama."""
    torch.set_num_threads(1)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    prepared = prepare(config, tokenizer, context_length(model.config))
    return TuneRun(config, model, tokenizer, prepared, resume=resume)


def silent() -> Console:
    return Console(file=io.StringIO())


def losses(config: TuneConfig) -> dict[int, float]:
    """Step -> training loss, as logged."""
    lines = (json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
