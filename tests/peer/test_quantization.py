"""Quantized and half-precision peers equal a local model of the same quantization and dtype, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from client.model.handle import swarm_of
from tests.tools.families import build_llama
from tests.tools.swarm import Swarm

VOCABULARY = 128
SPANS = ("0:1", "1:4")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that bitsandbytes quantizes its layers."""
    root = tmp_path_factory.getbasetemp() / "models"
    return build_llama(root, name="wide", hidden=128, layers=4, heads=4, intermediate=256, vocab=VOCABULARY)


def four_bits(double: bool) -> Callable[[], BitsAndBytesConfig]:
    return lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


QUANTIZATIONS: dict[str, tuple[list[str], Callable[[], BitsAndBytesConfig]]] = {
    "nf4": (["--quantize", "nf4"], four_bits(double=False)),
    "nf4, scales too": (["--quantize", "nf4", "--double-quantize"], four_bits(double=True)),
    "int8": (["--quantize", "int8"], lambda: BitsAndBytesConfig(load_in_8bit=True)),
}


def load_local(path: Path, **options: Any) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map={"": "cpu"}, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as the peers: else it packs its weights and cannot go back
    return model


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_lora(model: torch.nn.Module) -> peft.PeftModel:
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def train_generate_train(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a user sees of two training steps, a generation and two more steps."""
    tuned, batch, seen = with_lora(model), padded_batch(), {}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        if step == 2:
            tuned.eval()
            greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
            with torch.no_grad():
                seen["tokens"] = tuned.generate(**batch, **greedy)
        loss = tuned.train()(**batch, labels=labels).loss
        loss.backward()
        seen[f"loss {step}"] = loss.detach()
        gradients = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
        assert len(gradients) == 2 * 3 * 4
        seen |= {f"gradient {step} {name}": gradient for name, gradient in gradients.items()}
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.Tensor:
    """Bit for bit, in everything; returns the logits."""
    batch = padded_batch()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = ours(**batch).logits[seen]
        assert torch.equal(logits, theirs(**batch).logits[seen])
    remote, local = train_generate_train(ours), train_generate_train(theirs)
    assert remote.keys() == local.keys()
    assert not torch.equal(local["loss 3"], local["loss 0"])
    assert [name for name, tensor in local.items() if not torch.equal(remote[name], tensor)] == []
    return logits


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantized_peer_equals_a_local_quantized_model(name: str, path: Path, swarm: Swarm) -> None:
    options, config = QUANTIZATIONS[name]
    swarm.serve(path, *SPANS, options=options)
    remote = swarm.connect(path)
    assert [peer.quantization for peer in swarm_of(remote).peers()] == [options[1]] * len(SPANS)
    logits = assert_equal(remote, load_local(path, dtype=torch.float32, quantization_config=config()))
    batch = padded_batch()
    with torch.no_grad():
        plain = load_local(path)(**batch).logits[batch["attention_mask"].bool()]
    assert 1e-4 < (logits - plain).abs().max() < 0.5


def test_bfloat16_peers_equal_a_local_bfloat16_model(path: Path, swarm: Swarm) -> None:
    swarm.serve(path, *SPANS, options=["--dtype", "bfloat16"])
    remote = swarm.connect(path, dtype="bfloat16")
    assert {peer.dtype for peer in swarm_of(remote).peers()} == {"bfloat16"}
    assert assert_equal(remote, load_local(path, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_peers_of_several_precisions_in_one_swarm(path: Path, swarm: Swarm) -> None:
    """Hidden states and gradients cross from one precision to the next; near to the model, if not equal to it."""
    swarm.serve(path, "0:1")
    swarm.serve(path, "1:2", options=["--quantize", "nf4"])
    swarm.serve(path, "2:3", options=["--quantize", "int8"])
    swarm.serve(path, "3:4", options=["--dtype", "bfloat16"])
    remote = swarm.connect(path)
    ours, theirs = train_generate_train(remote), train_generate_train(load_local(path))
    gradients = [name for name in theirs if name.startswith("gradient 0")]
    for name in ("loss 0", *gradients):
        error = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert error < 0.2, (name, error)
