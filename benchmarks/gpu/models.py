"""Random weights of models that nobody has to download, some of which no card could hold."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

from benchmarks.capacity import MODELS
from protocol.model.checkpoint import INDEX_FILE, Checkpoint

SHAPES: dict[str, tf.PretrainedConfig] = {
    "BLOOM-176B": MODELS["BLOOM-176B"],
    "Llama-3.3-70B": MODELS["Llama-3.3-70B"],
    "Llama-2-7B": tf.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096,
    ),
}  # fmt: skip
_STD = 0.02


def shaped(name: str, tiny: bool) -> tf.PretrainedConfig:
    """The configuration of one of `SHAPES`; `tiny`: of a few small blocks of its kind."""
    if not tiny:
        return SHAPES[name]
    if SHAPES[name].model_type == "bloom":
        return tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=6, n_head=4)
    return tf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip


class _RandomSlice:
    """A tensor of a checkpoint that nobody has, as safetensors give it: made when it is read, where it is wanted."""

    def __init__(self, shape: tuple[int, ...], device: str, is_norm: bool):
        self._shape, self._device, self._is_norm = shape, device, is_norm

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> torch.Tensor:
        made = torch.empty(self._shape, dtype=torch.bfloat16, device=self._device)
        return (made.fill_(1) if self._is_norm else made.normal_(0, _STD))[index]


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """Random weights in bfloat16 of a configuration. No tensor is there before it is read."""

    device: str = "cpu"

    @classmethod
    def of(cls, config: tf.PretrainedConfig, device: str) -> "RandomCheckpoint":
        """Its tensors are made on `device`."""
        config.dtype = torch.bfloat16
        return cls(f"random {config.model_type}", None, config, config.to_dict(), device=device)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> the file that `write` puts it into: one for each block, one for the rest."""
        numbers = {name: re.search(r"\.(\d+)\.", name) for name in self._shapes}
        return {name: f"model-{match[1] if match else 'rest'}.safetensors" for name, match in numbers.items()}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(self.config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def state_dict(self, wanted: Callable[[str], bool]) -> dict[str, Any]:
        """Name -> a slice, as of files."""
        return {
            name: _RandomSlice(shape, self.device, len(shape) == 1 and name.endswith("weight"))
            for name, shape in self._shapes.items()
            if wanted(name)
        }

    def write(self, folder: Path) -> Path:
        """Make a folder of it, file after file."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        for file in set(self.weight_map.values()):
            slices = self.state_dict(lambda name, file=file: self.weight_map[name] == file)  # type: ignore[misc]
            save_file({name: found[:].cpu() for name, found in slices.items()}, folder / file, {"format": "pt"})
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": self.weight_map}))
        return folder


def load_local(path: Path, device: str, dtype: torch.dtype, quantize: str) -> Any:
    """What plain Transformers makes of a checkpoint: all of it on one device, quantized as it comes."""
    options: dict[str, Any] = {}
    if quantize == "int8":
        options["quantization_config"] = tf.BitsAndBytesConfig(load_in_8bit=True)
    elif quantize == "nf4":
        options["quantization_config"] = tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}, **options).eval()
    for module in model.modules():  # docs/traps.md: packed weights have no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
