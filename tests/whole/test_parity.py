"""Every family over three real peers equals plain local Transformers + PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tests.tools.families import FAMILIES
from tests.tools.swarm import Swarm

VOCABULARY = 128
TARGETS = {
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value"],
    "falcon": ["query_key_value"],
    "phi3": ["qkv_proj"],
    "deepseek_v3": ["kv_b_proj", "o_proj"],
}


def padded_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_lora(model: torch.nn.Module, family: str) -> peft.PeftModel:
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS.get(family, ["q_proj", "v_proj"]), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, copy.deepcopy(config)).train()


def loss_and_gradients(model: torch.nn.Module, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tuned, batch = with_lora(model, family), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(11)
    loss = tuned(**batch, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert gradients
    assert all(grad is not None for grad in gradients.values())
    return loss.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_tokens_loss_and_gradients(family: str, models: Callable[[str], Path], swarm: Swarm) -> None:
    path = models(family)
    swarm.serve(path, "0:2", "2:3", "3:5")
    remote = swarm.connect(path)
    local = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    batch = padded_batch()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(remote(**batch).logits[seen], local(**batch).logits[seen])
        greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        assert torch.equal(remote.generate(**batch, **greedy), local.generate(**batch, **greedy))
    ours, theirs = loss_and_gradients(remote, family), loss_and_gradients(local, family)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert torch.equal(ours[1][name], grad), name
