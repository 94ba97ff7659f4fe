"""Merging adapters: the merged folder, in plain Transformers, against PEFT on the whole model."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from client.merge import write as merge_write
from client.merge.run import MergeError, MergeReport, merge_adapter
from tests.tools.command import Command

_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _TOKENS | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
_CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_LLAMA, intermediate_size=48),
    "tied": lambda: tf.LlamaConfig(**_LLAMA, intermediate_size=48, tie_word_embeddings=True),
    "llama64": lambda: tf.LlamaConfig(**_LLAMA | {"hidden_size": 64}, intermediate_size=64),
    "bloom": lambda: tf.BloomConfig(**_TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "gpt2": lambda: tf.GPT2Config(**_TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "mixtral": lambda: tf.MixtralConfig(**_LLAMA, intermediate_size=48, num_local_experts=4),
}
_TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "tied": ["q_proj", "down_proj"],
    "llama64": ["q_proj", "down_proj"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj"],
    "mixtral": ["q_proj", "o_proj"],
}
_EMBEDDING = {"llama": "embed_tokens", "tied": "embed_tokens", "bloom": "word_embeddings", "gpt2": "wte",
              "mixtral": "embed_tokens"}  # fmt: skip
_INPUT = torch.arange(3, 35).view(2, 16)

Base = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tf.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Makes tiny random models, in several shards; each once."""
    root = tmp_path_factory.mktemp("bases")

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = root / f"{family}-{dtype}"
        if not folder.exists():
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(_CONFIGS[family](), dtype=dtype)
            _shake(model.parameters(), 0.05)
            model.save_pretrained(folder, max_shard_size="40KB")
            (folder / "tokenizer_config.json").write_text('{"from": "base"}')
            (folder / "vocab.txt").write_text("a\nb\n")
        return folder

    return make


def _shake(parameters: Any, much: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * much)


def _train(
    folder: Path, config: peft.PeftConfig, out: Path, auto: Any = tf.AutoModelForCausalLM, **options: Any
) -> Any:
    """A PEFT model whose trainable tensors are not as initialised; its adapter is saved in `out`."""
    torch.manual_seed(1)
    model = peft.get_peft_model(auto.from_pretrained(folder, **options), config)
    _shake([parameter for parameter in model.parameters() if parameter.requires_grad], 0.05)
    model.save_pretrained(out)
    return model.eval()


def _lora(family: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": _TARGETS[family]} | options)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(_INPUT).logits.float()


def _plain(folder: Path, **options: Any) -> Any:
    model, info = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def _peft_merged(folder: Path, adapter: Path, **options: Any) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(folder, **options)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


METHODS: dict[str, Callable[[str], peft.PeftConfig]] = {
    "lora": _lora,
    "all-linear": lambda f: _lora(f, target_modules="all-linear"),
    "patterns": lambda f: _lora(
        f, use_rslora=True, rank_pattern={_TARGETS[f][0]: 2}, alpha_pattern={_TARGETS[f][1]: 3}, layers_to_transform=[1]
    ),
    "dora": lambda f: _lora(f, use_dora=True),
    "bias": lambda f: _lora(f, bias="all"),
    "ia3": lambda f: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=_TARGETS[f], feedforward_modules=_TARGETS[f][1:]
    ),
    "modules_to_save": lambda f: _lora(f, modules_to_save=[_EMBEDDING[f], "lm_head"]),
    "tokens": lambda f: _lora(f, trainable_token_indices=[3, 5, 7]),
}
LINEAR_ONLY: dict[str, Callable[[str], peft.PeftConfig]] = {
    "lokr": lambda f: peft.LoKrConfig(task_type="CAUSAL_LM", r=4, target_modules=_TARGETS[f]),
    "loha": lambda f: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=_TARGETS[f]),
    "oft": lambda f: peft.OFTConfig(task_type="CAUSAL_LM", r=4, oft_block_size=0, target_modules=_TARGETS[f]),
    "boft": lambda f: peft.BOFTConfig(task_type="CAUSAL_LM", boft_block_size=4, target_modules=_TARGETS[f]),
}
LLAMA_ONLY: dict[str, Callable[[str], peft.PeftConfig]] = {
    "adalora": lambda f: peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, target_modules=_TARGETS[f]
    ),
    "vera": lambda f: peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"]),
    "vera-seed": lambda f: peft.VeraConfig(
        task_type="CAUSAL_LM", r=8, target_modules=["q_proj"], save_projection=False
    ),
    "pissa": lambda f: _lora(f, init_lora_weights="pissa"),
    "olora": lambda f: _lora(f, init_lora_weights="olora"),
    "embedding": lambda f: _lora(f, target_modules=["q_proj", "embed_tokens"]),
    "head": lambda f: _lora(f, target_modules=["q_proj", "lm_head"]),
    "fourierft": lambda f: peft.FourierFTConfig(task_type="CAUSAL_LM", n_frequency=30, target_modules=_TARGETS[f]),
    "hra": lambda f: peft.HRAConfig(task_type="CAUSAL_LM", r=4, target_modules=_TARGETS[f]),
    "layer norms": lambda f: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
}
CASES = (
    [("llama", name, make) for name, make in (METHODS | LINEAR_ONLY | LLAMA_ONLY).items()]
    + [
        (family, name, METHODS[name])
        for family in ("bloom", "gpt2", "mixtral")
        for name in ("lora", "all-linear", "dora", "bias", "ia3", "modules_to_save")
    ]
    + [("mixtral", "lokr", LINEAR_ONLY["lokr"])]
    + [("mixtral", "experts", lambda f: _lora(f, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))]
    + [("mixtral", "experts by their old names", lambda f: _lora(f, target_modules=["w1", "w2", "w3"]))]
)


@pytest.mark.parametrize(("family", "name", "make"), CASES, ids=[f"{family}-{name}" for family, name, _ in CASES])
def test_same_as_peft(base: Base, tmp_path: Path, family: str, name: str, make: Callable[[str], Any]) -> None:
    folder = base(family)
    trained = _train(folder, make(family), tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", folder, tmp_path / "out", max_shard_bytes=30_000)
    merged = _logits(_plain(tmp_path / "out"))
    assert _difference(merged, _logits(_peft_merged(folder, tmp_path / "adapter"))) == 0.0
    assert _difference(merged, _logits(trained)) < 2e-6
    assert _difference(merged, _logits(_plain(folder))) > 1e-4
    assert report.shards > 1
    assert report.modules >= 2


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "tokens", "modules_to_save", "bias"])
def test_same_as_peft_in_bf16(base: Base, tmp_path: Path, name: str) -> None:
    folder = base("llama", torch.bfloat16)
    _train(folder, METHODS[name]("llama"), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", folder, tmp_path / "out")
    reference = _peft_merged(folder, tmp_path / "adapter").state_dict()
    for key, tensor in _plain(tmp_path / "out").state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, reference[key]), key


TIES: dict[str, tuple[Callable[[], peft.PeftConfig], bool]] = {
    "lora on the embedding": (lambda: _lora("tied", target_modules=["q_proj", "embed_tokens"]), True),
    "lora on the head": (lambda: _lora("tied", target_modules=["q_proj", "lm_head"]), True),
    "lora on both": (lambda: _lora("tied", target_modules=["embed_tokens", "lm_head"]), True),
    "lora on both, tied": (lambda: _lora("tied", target_modules=["embed_tokens"], ensure_weight_tying=True), False),
    "embedding trained": (lambda: _lora("tied", modules_to_save=["embed_tokens"]), True),
    "both trained": (lambda: _lora("tied", modules_to_save=["embed_tokens", "lm_head"]), True),
    "both trained, tied": (lambda: _lora("tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True), False),
    "tokens trained": (lambda: _lora("tied", trainable_token_indices=[3, 4]), False),
    "neither": (lambda: _lora("tied"), False),
}


@pytest.mark.parametrize(("make", "untied"), TIES.values(), ids=TIES)
def test_tied_embeddings(base: Base, tmp_path: Path, make: Callable[[], peft.PeftConfig], untied: bool) -> None:
    # Against the adapted model itself: with LoRA on a tied weight `merge_and_unload` changes embedding and head alike.
    trained = _train(base("tied"), make(), tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", base("tied"), tmp_path / "out")
    assert _difference(_logits(_plain(tmp_path / "out")), _logits(trained)) < 2e-6
    assert report.untied is untied
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is not untied


@pytest.mark.parametrize("trained_on", ["embed_tokens", "lm_head"])
def test_tied_embeddings_stored_twice(base: Base, tmp_path: Path, trained_on: str) -> None:
    shutil.copytree(base("tied"), tmp_path / "base")
    embedding = _plain(base("tied")).get_input_embeddings().weight.data.clone()
    save_file({"lm_head.weight": embedding}, tmp_path / "base/head.safetensors", {"format": "pt"})
    index = tmp_path / "base/model.safetensors.index.json"
    _edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": "head.safetensors"})
    trained = _train(tmp_path / "base", _lora("tied", target_modules=["q_proj", trained_on]), tmp_path / "adapter")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out").untied
    assert _difference(_logits(_plain(tmp_path / "out")), _logits(trained)) < 2e-6


@pytest.mark.parametrize(("auto", "task"), [
    (tf.AutoModelForSequenceClassification, "SEQ_CLS"),
    (tf.AutoModelForTokenClassification, "TOKEN_CLS"),
])  # fmt: skip
def test_classifier(base: Base, tmp_path: Path, auto: Any, task: str) -> None:
    trained = _train(base("llama"), _lora("llama", task_type=task), tmp_path / "adapter", auto, num_labels=3)
    merge_adapter(tmp_path / "adapter", base("llama"), tmp_path / "out")
    merged, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert merged.config.num_labels == 3
    assert _difference(_logits(merged), _logits(trained)) < 2e-6


@pytest.mark.parametrize(("stored", "wanted"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
])  # fmt: skip
def test_other_dtype(base: Base, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    """The merge runs in the wider type and is rounded once."""
    folder = base("llama", stored)
    _train(folder, _lora("llama"), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", folder, tmp_path / "out", dtype=wanted)
    reference = _peft_merged(folder, tmp_path / "adapter", dtype=torch.float32).state_dict()
    for key, tensor in _plain(tmp_path / "out").state_dict().items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, reference[key].to(wanted)), key


def test_adapter_stored_in_bf16(base: Base, tmp_path: Path) -> None:
    """Without a task type, as plain `inject` users save it, too."""
    _train(base("llama"), _lora("llama", task_type=None), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    merge_adapter(tmp_path / "adapter", base("llama"), tmp_path / "out")
    reference = _peft_merged(base("llama"), tmp_path / "adapter")
    assert _difference(_logits(_plain(tmp_path / "out")), _logits(reference)) == 0.0


def test_refuses_what_float16_cannot_hold(base: Base, tmp_path: Path) -> None:
    _train(base("llama"), _lora("llama", modules_to_save=["lm_head"]), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor * (1e6 if "lm_head" in key else 1) for key, tensor in tensors.items()}, file)
    with pytest.raises(MergeError, match=r"lm_head\.weight has values beyond float16"):
        merge_adapter(tmp_path / "adapter", base("llama"), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4", "nf4 twice", "int8"])
@pytest.mark.parametrize("family", ["llama64", "gpt2"])
def test_quantized_base(base: Base, tmp_path: Path, family: str, kind: str) -> None:
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind.startswith("nf4"):
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind != "nf4"}
    quantization = tf.BitsAndBytesConfig(**options)
    _train(base(family), _lora(family), tmp_path / "adapter")
    load = tf.AutoModelForCausalLM.from_pretrained
    load(base(family), quantization_config=quantization, device_map="cpu").save_pretrained(tmp_path / "base")
    merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    dense = load(tmp_path / "base", device_map="cpu").dequantize()
    if family == "gpt2":  # its dequantized modules are Linear, where the adapter knows Conv1D
        plain = _plain(base(family))
        for name, module in plain.named_modules():
            if type(module).__name__ == "Conv1D":
                module.weight.data = dense.get_submodule(name).weight.data.T.contiguous()
        dense = plain
    reference = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    assert _difference(_logits(_plain(tmp_path / "out")), _logits(reference)) < 1e-6
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_checkpoint_without_the_prefix(base: Base, tmp_path: Path) -> None:
    """BLOOM on the hub has `h.0...` for what the model calls `transformer.h.0...`; an untied head is new to it."""
    shutil.copytree(base("bloom"), tmp_path / "base")
    tensors = {}
    for file in (tmp_path / "base").glob("*.safetensors*"):
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    trained = _train(tmp_path / "base", _lora("bloom", modules_to_save=["word_embeddings"]), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert set(opened.keys()) == {*tensors, "lm_head.weight"}
    assert _difference(_logits(_plain(tmp_path / "out")), _logits(trained)) < 2e-6


def test_untouched_tensors_and_files(base: Base, tmp_path: Path) -> None:
    """What no adapter touches is bit for bit the base's; the adapter's own tokenizer goes over the base's."""
    _train(base("mixtral"), _lora("mixtral"), tmp_path / "adapter")
    (tmp_path / "adapter/tokenizer_config.json").write_text('{"from": "adapter"}')
    lines: list[str] = []
    report = merge_adapter(tmp_path / "adapter", base("mixtral"), tmp_path / "out", report=lines.append)
    merged = load_file(tmp_path / "out/model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for file in base("mixtral").glob("*.safetensors"):
        stored |= load_file(file)
    assert merged.keys() == stored.keys()
    changed = {key for key in stored if not torch.equal(stored[key], merged[key])}
    assert changed == {key for key in stored if "q_proj" in key or "o_proj" in key}
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"from": "adapter"}'
    assert (tmp_path / "out/vocab.txt").read_text() == "a\nb\n"
    assert (tmp_path / "out/generation_config.json").exists()
    nbytes = sum(tensor.nbytes for tensor in merged.values())
    assert report == MergeReport(tmp_path / "out", "LORA", 4, len(merged), nbytes, 1, False)
    assert "4 of 4" in lines[-2]


# --- refusals


def _refused(adapter: Path, folder: Path, out: Path) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(MergeError) as caught:
        merge_adapter(adapter, folder, out)
    assert sorted(out.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refuses_a_folder_in_use(base: Base, tmp_path: Path) -> None:
    _train(base("llama"), _lora("llama"), tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    assert "not an empty folder" in _refused(tmp_path / "adapter", base("llama"), out)
    assert (out / "precious").read_text() == "kept"
    (out / "precious").unlink()
    assert merge_adapter(tmp_path / "adapter", base("llama"), out).tensors > 0


def test_refuses_what_is_no_adapter(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in _refused(tmp_path / "empty", base("llama"), tmp_path / "out")
    _train(base("llama"), _lora("llama"), tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")
    assert "'no/such-adapter'" in _refused(Path("no/such-adapter"), base("llama"), tmp_path / "out")


def test_a_revision_of_a_base_on_the_hub(
    base: Base, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(name: str, revision: str | None = None, **_patterns: Any) -> str:
        asked[name] = revision
        return str(base("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    _train(base("llama"), _lora("llama"), tmp_path / "adapter")
    wanted = ("--base", "some/model", "--revision", "v2", "--dtype", "auto", "--out", tmp_path / "out")
    outcome = command("merge", tmp_path / "adapter", *wanted)
    assert outcome.code == 0, outcome
    assert asked == {"some/model": "v2"}
    assert _plain(tmp_path / "out").dtype == torch.float32


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
], ids=["prompt", "prefix", "p-tuning"])  # fmt: skip
def test_refuses_prompts(base: Base, tmp_path: Path, config: Any) -> None:
    _train(base("llama"), config, tmp_path / "adapter")
    message = _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")
    assert "cannot be merged" in message
    assert "PeftModel.from_pretrained" in message


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_refuses_another_base(base: Base, tmp_path: Path) -> None:
    _train(base("llama"), _lora("llama"), tmp_path / "adapter")
    message = _refused(tmp_path / "adapter", base("bloom"), tmp_path / "out")
    assert "q_proj" in message
    assert "BloomForCausalLM" in message
    message = _refused(tmp_path / "adapter", base("llama64"), tmp_path / "out")
    assert "q_proj.lora_A.weight is [4, 32], and this base needs [4, 64]" in message
    shutil.copytree(base("llama"), tmp_path / "short")
    _edit(tmp_path / "short/config.json", num_hidden_layers=1)
    message = _refused(tmp_path / "adapter", tmp_path / "short", tmp_path / "out")
    assert "model.layers.1.mlp.down_proj.lora_A.weight" in message


def test_refuses_an_incomplete_adapter(base: Base, tmp_path: Path) -> None:
    _train(base("llama"), _lora("llama", modules_to_save=["lm_head"]), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    lost = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file)
    assert "layers.1.self_attn.q_proj" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if "lm_head" not in key}, file)
    assert "lm_head" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")
    save_file({key: tensor * torch.nan for key, tensor in tensors.items()}, file)
    assert "not numbers" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a sound safetensors file" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")


def test_refuses_a_resized_vocabulary(base: Base, tmp_path: Path) -> None:
    model = _plain(base("llama"))
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "resized")
    _train(tmp_path / "resized", _lora("llama", target_modules=["embed_tokens"]), tmp_path / "adapter")
    assert "resized" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "resized", tmp_path / "out").modules == 1


def test_refuses_what_starts_from_the_base(base: Base, tmp_path: Path) -> None:
    """Inits that change the base weights in ways that cannot be repeated, and methods that factor all of them."""
    _train(base("llama"), _lora("llama", init_lora_weights="pissa_niter_2"), tmp_path / "niter")
    assert "path_initial_model_for_weight_conversion" in _refused(tmp_path / "niter", base("llama"), tmp_path / "out")
    _train(base("llama"), peft.OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), tmp_path / "osf")
    assert "OSF" in _refused(tmp_path / "osf", base("llama"), tmp_path / "out")
    alora = _lora("llama", alora_invocation_tokens=[5, 6])
    _train(base("llama"), alora, tmp_path / "alora")
    assert "aLoRA" in _refused(tmp_path / "alora", base("llama"), tmp_path / "out")


def test_refuses_a_bad_base(base: Base, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    _train(base("llama"), _lora("llama"), adapter)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(base("llama"), tmp_path / name))

    index = "model.safetensors.index.json"
    shard = next(broken("shard").glob("*.safetensors"))
    shard.unlink()
    assert shard.name in _refused(adapter, tmp_path / "shard", tmp_path / "out")
    weights = json.loads((broken("escape") / index).read_text())["weight_map"]
    _edit(tmp_path / "escape" / index, weight_map=weights | {"x": "../../secret.safetensors"})
    assert "plain file names" in _refused(adapter, tmp_path / "escape", tmp_path / "out")
    _edit(broken("gptq") / "config.json", quantization_config={"quant_method": "gptq"})
    assert "gptq" in _refused(adapter, tmp_path / "gptq", tmp_path / "out")
    _edit(broken("wide") / "config.json", vocab_size=97)
    assert "lm_head.weight of the base is [96, 32]" in _refused(adapter, tmp_path / "wide", tmp_path / "out")
    for file in broken("pickle").glob("*.safetensors*"):
        file.unlink()
    assert "save_pretrained" in _refused(adapter, tmp_path / "pickle", tmp_path / "out")
    _edit(broken("foreign") / "config.json", model_type="no_such_model")
    assert "cannot build" in _refused(adapter, tmp_path / "foreign", tmp_path / "out")


def test_no_space(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(base("llama"), _lora("llama"), tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(merge_write.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "GB left" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_write.os, "fsync", full)
    assert "No space was left" in _refused(tmp_path / "adapter", base("llama"), tmp_path / "out")


def test_interrupted(base: Base, tmp_path: Path) -> None:
    _train(base("llama"), _lora("llama"), tmp_path / "adapter")

    def interrupt(line: str) -> None:
        if line.startswith("Merged"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tmp_path / "adapter", base("llama"), tmp_path / "out", report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
