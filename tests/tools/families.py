"""Small random checkpoints of many model families, and larger random Llamas, for tests and benchmarks.

A family's model has 5 blocks, hidden size 32, a vocabulary of 128, a sliding window of 8 where the family has one, and
no dropout. Every checkpoint is sharded, so that reading only some blocks' weights is exercised.
"""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from filelock import FileLock

_TOKENS: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _TOKENS | {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
_LONG = _SIZES | {"max_position_embeddings": 256}
_OPT = _LONG | {"ffn_dim": 64, "dropout": 0.0}
_GATED = _LONG | {"intermediate_size": 64, "num_key_value_heads": 2}
_HEADS_OF_8 = _GATED | {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 8}
_ALTERNATING = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
_GEMMA = _HEADS_OF_8 | _ALTERNATING | {"query_pre_attn_scalar": 8}

_Spec = tuple[type[tf.PretrainedConfig], dict[str, Any]]

_MAIN_SPECS: dict[str, _Spec] = {
    "bloom": (tf.BloomConfig, _TOKENS | {"hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "opt": (tf.OPTConfig, _OPT | {"word_embed_proj_dim": 32}),
    "gpt2": (
        tf.GPT2Config,
        _TOKENS
        | {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 256, "scale_attn_by_inverse_layer_idx": True}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "gpt_neox": (tf.GPTNeoXConfig, _LONG | {"intermediate_size": 64}),
    "llama": (tf.LlamaConfig, _GATED),
    "mistral": (tf.MistralConfig, _HEADS_OF_8 | _WINDOW),
    "mixtral": (tf.MixtralConfig, _GATED | _LOCAL_EXPERTS),
    "qwen2": (tf.Qwen2Config, _GATED | _WINDOW | {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen3": (tf.Qwen3Config, _HEADS_OF_8),
    "gemma2": (tf.Gemma2Config, _GEMMA),
    "gemma3": (tf.Gemma3TextConfig, _GEMMA),
    "phi3": (tf.Phi3Config, _GATED | _WINDOW),
    "falcon": (tf.FalconConfig, _SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "glm4": (tf.Glm4Config, _HEADS_OF_8),
    "gpt_oss": (tf.GptOssConfig, _HEADS_OF_8 | _LOCAL_EXPERTS | _ALTERNATING),
    "deepseek_v3": (
        tf.DeepseekV3Config,
        _GATED
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 2},
    ),
}

_EXTRA_SPECS: dict[str, _Spec] = {
    "opt350": (tf.OPTConfig, _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "falcon_alibi": (tf.FalconConfig, _SIZES | {"alibi": True, "multi_query": True}),
    "qwen3_moe": (tf.Qwen3MoeConfig, _HEADS_OF_8 | _EXPERTS | {"moe_intermediate_size": 32}),
    "granite": (
        tf.GraniteConfig,
        _GATED
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0}
        | {"residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "olmo2": (tf.Olmo2Config, _GATED),
    "cohere2": (tf.Cohere2Config, _HEADS_OF_8 | _ALTERNATING),
    "smollm3": (tf.SmolLM3Config, _GATED),
    "llama4": (
        tf.Llama4TextConfig,
        _HEADS_OF_8
        | {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 16, "no_rope_layers": [1, 1, 1, 0, 1]},
    ),
    "qwen3_next": (
        tf.Qwen3NextConfig,
        _HEADS_OF_8
        | _EXPERTS
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
}

_SEES = {
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "depth": 5, "num_attention_heads": 2,
        "num_heads": 2, "out_hidden_size": 32, "image_size": 16, "patch_size": 4, "vision_output_dim": 32,
        "projector_input_dim": 16, "projector_output_dim": 32, "fullatt_block_indexes": [1],
    }
}  # fmt: skip
"""As many blocks of its own as the language model has."""

_MULTIMODAL_SPECS: dict[str, _Spec] = {
    "gemma3_full": (
        tf.Gemma3Config,
        _SEES
        | {"text_config": _GEMMA, "mm_tokens_per_image": 4, "image_token_index": 127, "tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        tf.Qwen2_5_VLConfig,
        _SEES
        | {"text_config": _GATED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}}
        | {"image_token_id": 126, "video_token_id": 127},
    ),
    "llama4_full": (tf.Llama4Config, _SEES | {"text_config": _EXTRA_SPECS["llama4"][1]}),
}

FAMILIES: tuple[str, ...] = tuple(_MAIN_SPECS)
EXTRA_FAMILIES: tuple[str, ...] = tuple(_EXTRA_SPECS)
MULTIMODAL_FAMILIES: tuple[str, ...] = tuple(_MULTIMODAL_SPECS)
"""Language models with a part that sees; the checkpoints have both."""


def family_config(name: str) -> tf.PretrainedConfig:
    """A fresh config of one of the families (KeyError otherwise)."""
    config_class, options = (_MAIN_SPECS | _EXTRA_SPECS | _MULTIMODAL_SPECS)[name]
    return config_class(**copy.deepcopy(options))


def build_family(name: str, root: Path) -> Path:
    """The checkpoint `root/name` of the family, float32, in shards of 60 KB; made on first use, the same every time.

    Every parameter differs from its initial value: with norms at one and biases at zero many mistakes would not show.
    """
    return build_small(root / name, family_config(name))


def short(family: str, context: int) -> tf.PretrainedConfig:
    """Of small models, `mpt` or `gptj`, whose blocks have a table of so many positions."""
    tokens: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "mpt":
        return tf.MptConfig(**tokens, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=context)
    return tf.GPTJConfig(**tokens, n_embd=32, n_head=4, n_layer=2, rotary_dim=4, n_positions=context)


def build_small(folder: Path, config: tf.PretrainedConfig) -> Path:
    """As `build_family`, of a configuration of one's own."""
    return _build(folder, config, perturbation=0.15, dtype=torch.float32, max_shard_size="60KB")


def build_llama(
    root: Path,
    *,
    name: str,
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "200MB",
) -> Path:
    """The checkpoint `root/name` of a random Llama of these sizes, as initialised; made on first use.

    Raises ValueError where `root/name` holds a model of other sizes or another dtype.
    """
    sizes = _TOKENS | {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }
    config = tf.LlamaConfig(**sizes)
    folder = _build(root / name, config, perturbation=0.0, dtype=dtype, max_shard_size=max_shard_size)
    saved = tf.LlamaConfig.from_pretrained(folder)
    if saved.dtype != dtype or any(getattr(saved, key) != size for key, size in sizes.items()):
        raise ValueError(f"{folder} holds a model of other sizes or dtype: delete it or use another name")
    return folder


def build_bloom(root: Path, *, name: str, hidden: int, layers: int, heads: int, vocab: int) -> Path:
    """The checkpoint `root/name` of a random Bloom of these sizes, float32, as initialised; made on first use."""
    sizes = _TOKENS | {"vocab_size": vocab, "hidden_size": hidden, "n_layer": layers, "n_head": heads}
    return _build(root / name, tf.BloomConfig(**sizes), perturbation=0.0, dtype=torch.float32, max_shard_size="200MB")


def _build(
    folder: Path, config: tf.PretrainedConfig, *, perturbation: float, dtype: torch.dtype, max_shard_size: str
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
                model = _random_model(config, perturbation, dtype)
                model.save_pretrained(Path(work, "model"), max_shard_size=max_shard_size)
                os.replace(Path(work, "model"), folder)
    return folder


def whole_class(config: tf.PretrainedConfig) -> Any:
    """The auto class of the whole model, where it sees or hears as well."""
    whole = tf.AutoModelForMultimodalLM
    return whole if type(config) in whole._model_mapping else tf.AutoModelForCausalLM


def _random_model(config: tf.PretrainedConfig, perturbation: float, dtype: torch.dtype) -> tf.PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: tf.PreTrainedModel = whole_class(config).from_config(config, dtype=dtype)
        if perturbation:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * perturbation)
    return model
