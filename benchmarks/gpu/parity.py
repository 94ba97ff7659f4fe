"""A swarm's logits, tokens, losses and LoRA gradients against local Transformers and PEFT on the same device."""

from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from benchmarks.gpu.gpu import Gpu
from benchmarks.gpu.models import load_local
from benchmarks.gpu.peers import serving
from benchmarks.gpu.report import Figures, Report
from client import AutoDistributedModelForCausalLM
from tests.tools.families import build_small
from tests.tools.parity import padded_batch, with_lora

_TOKENS: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _TOKENS | {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
_GATED = _SIZES | {"intermediate_size": 512, "max_position_embeddings": 512}
_LAYERS = ["sliding_attention", "full_attention"] * 3
_FAMILIES: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**_GATED),
    "bloom": tf.BloomConfig(**_TOKENS, hidden_size=256, n_layer=6, n_head=8),
    "qwen3": tf.Qwen3Config(**_GATED, head_dim=32),
    "gemma3": tf.Gemma3TextConfig(
        **_GATED, head_dim=32, sliding_window=8, layer_types=_LAYERS, query_pre_attn_scalar=32
    ),
}
"""Small, but wide enough for every kernel: nf4 takes multiples of 64."""
_TARGETS = {"bloom": ["query_key_value", "dense_h_to_4h"]}
_USUAL_TARGETS = ["q_proj", "v_proj", "down_proj"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CLOSE = {"float32": 1e-4}
_ROUGH = 0.1
"""In 16 bits, kernels for other shapes round otherwise, and gradients are sums of many such."""
_SPANS = ("0:2", "2:6")
_NEW_TOKENS = 24


def run(report: Report, gpu: Gpu, root: Path, tiny: bool) -> None:
    """Each family in each dtype; some quantized."""
    cases = [*product(_FAMILIES, _DTYPES, ["none"]), *product(_FAMILIES, ["bfloat16"], ["nf4", "int8"])]
    if tiny:
        cases = [("llama", "float32", "none"), ("bloom", "bfloat16", "nf4")]
    for family, dtype, quantize in cases:
        name = f"{family} {dtype}" if quantize == "none" else f"{family} {quantize}"
        report.attempt("parity", name, lambda case=(name, family, dtype, quantize): _case(report, gpu, root, *case))  # type: ignore[misc]


def _case(report: Report, gpu: Gpu, root: Path, name: str, family: str, dtype: str, quantize: str) -> Figures:
    path = build_small(root / family, _FAMILIES[family])
    options = {"dtype": dtype, "quantize": quantize, "device": gpu.name, "cache_tokens": 4096}
    with serving(path, _SPANS, **options) as address:
        local = load_local(path, gpu.name, _DTYPES[dtype], quantize)
        if gpu.is_gpu and dtype == "float32":
            figures = _compare(path, address, torch.device("cpu"), local, family, dtype)
            report.put("parity", f"{name}, client on the CPU", figures)
            local = load_local(path, gpu.name, _DTYPES[dtype], quantize)  # that one has an adapter in it now
        figures = _compare(path, address, gpu.device, local, family, dtype)
    report.put("parity", name, figures)
    worst = max(figures["logits off by"], figures["worst gradient"], figures["loss"])
    if not worst <= _CLOSE.get(dtype, _ROUGH):
        raise ArithmeticError(f"it differs by {worst:.1e} from one machine")
    return {}


def _compare(path: Path, address: str, at: torch.device, local: Any, family: str, dtype: str) -> dict[str, float]:
    """Relative differences of the swarm's figures, its client's own part being `at` a device."""
    remote: Any = AutoDistributedModelForCausalLM.from_pretrained(
        str(path), initial_peers=[address], dtype=_DTYPES[dtype]
    )
    models = remote.to(at), local
    batches = [{name: tensor.to(model.device) for name, tensor in padded_batch().items()} for model in models]
    seen = padded_batch()["attention_mask"].bool()
    greedy = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits = [model(**batch).logits.float().cpu()[seen] for model, batch in zip(models, batches, strict=True)]
        tokens = [model.generate(**batch, **greedy).cpu() for model, batch in zip(models, batches, strict=True)]
    ours, theirs = (with_lora(model, _TARGETS.get(family, _USUAL_TARGETS)).to(model.device) for model in models)
    trained = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    with torch.no_grad():  # PEFT draws in the weights' dtype, and int8 has another one than its ghosts
        for name, value in ours.named_parameters():
            if value.requires_grad:
                value.copy_(trained[name])
    losses = [_loss(model, batch) for model, batch in zip((ours, theirs), batches, strict=True)]
    mine = {name: value.grad for name, value in ours.named_parameters() if value.grad is not None}
    assert mine.keys() == trained.keys(), mine.keys() ^ trained.keys()
    gradients = [_difference(mine[name], value.grad) for name, value in trained.items()]
    return {
        "logits off by": _difference(*logits),
        "equal tokens": float((tokens[0] == tokens[1]).float().mean()),
        "loss": _difference(*losses),
        "worst gradient": max(gradients),
    }


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: torch.Tensor = model(**batch, labels=labels).loss
    loss.backward()
    return loss.detach()


def _difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    mine, other = mine.float().cpu(), other.float().cpu()
    return float((mine - other).norm() / other.norm())
