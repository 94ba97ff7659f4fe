"""The same model, plain and through a swarm: do both give the same numbers?"""

import copy
from typing import Any

import peft
import torch
import transformers

VOCABULARY = 128


def local_model(path: Any) -> Any:
    """What a user without a swarm loads for text: a causal language model, or one that does more besides."""
    config = transformers.AutoConfig.from_pretrained(path)
    causal = transformers.AutoModelForCausalLM
    auto_class: Any = causal if type(config) in causal._model_mapping else transformers.AutoModelForMultimodalLM
    return auto_class.from_pretrained(path).eval()


def padded_batch() -> dict[str, torch.Tensor]:
    """Two rows of 20 tokens, the first of which is padded at the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 8, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_lora(model: torch.nn.Module, targets: Any) -> peft.PeftModel:
    """The model with a fresh LoRA adapter on `targets`, the same every time; in training mode."""
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, copy.deepcopy(config)).train()


def loss_and_gradients(model: torch.nn.Module, targets: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch with an adapter on `targets`, and the gradients of all of its tensors that have one."""
    tuned, batch = with_lora(model, targets), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(11)
    loss = tuned(**batch, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def differences(remote: Any, local: Any, targets: Any) -> dict[str, float]:
    """The largest absolute difference of logits, greedy tokens, loss and LoRA gradients; empty where all are equal."""
    batch = padded_batch()
    seen = batch["attention_mask"].bool()
    greedy = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        pairs = {
            "logits": (remote(**batch).logits[seen], local(**batch).logits[seen]),
            "tokens": (remote.generate(**batch, **greedy), local.generate(**batch, **greedy)),
        }
    (loss, ours), (local_loss, theirs) = loss_and_gradients(remote, targets), loss_and_gradients(local, targets)
    assert theirs
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    pairs |= {"loss": (loss, local_loss)} | {name: (ours[name], theirs[name]) for name in theirs}
    return {
        name: float((mine - other).abs().max()) for name, (mine, other) in pairs.items() if not torch.equal(mine, other)
    }
