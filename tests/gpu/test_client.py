"""A client whose model is on the GPU: same numbers. Its peers are on the CPU and on either GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.tools.device_library import is_loaded
from tests.tools.swarm import Both, ForkServer, new_swarm

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def llamas(fork_server: ForkServer, device: torch.device, models: Callable[[str], Path]) -> Iterator[Both]:
    """Served by a peer on the CPU and one on another GPU, if there is one."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:2")
        other = "cuda:1" if is_loaded() or torch.cuda.device_count() > 1 else "cuda:0"
        swarm.serve(models("llama"), "2:5", options=("--device", other))
        yield Both(models("llama"), swarm)


def batch(device: torch.device | str) -> dict[str, torch.Tensor]:
    """Two rows, the first one padded at the left."""
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def with_lora(model: Any) -> Any:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def trained(model: Any, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The loss of a step and its gradients, in host memory."""
    inputs = batch(device)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    found = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {grad.device for grad in found.values()} == {torch.device(device)}
    return {"loss": loss.detach().cpu()} | {name: grad.cpu() for name, grad in found.items()}


def test_same_tokens(llamas: Both, device: torch.device) -> None:
    ours, theirs = llamas.remote().to(device), llamas.local()
    for beams in (1, 3):
        generated = ours.generate(**batch(device), **GREEDY, num_beams=beams)
        assert torch.equal(generated.cpu(), theirs.generate(**batch("cpu"), **GREEDY, num_beams=beams))


def test_alibi_and_a_mask(fork_server: ForkServer, device: torch.device, models: Callable[[str], Path]) -> None:
    """Falcon computes with the mask itself, before any block is asked."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("falcon_alibi"), "0:5", options=("--device", str(device)))
        both = Both(models("falcon_alibi"), swarm)
        ours = both.remote().to(device).generate(**batch(device), **GREEDY)
        assert torch.equal(ours.cpu(), both.local().generate(**batch("cpu"), **GREEDY))


def test_rows_of_a_cache(llamas: Both, device: torch.device) -> None:
    def run(model: Any, where: torch.device | str) -> torch.Tensor:
        with torch.no_grad():
            cache = model(**batch(where)).past_key_values
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, -1], device=where))
            cache.reorder_cache(torch.tensor([2, 0, 1], device=where))
            return model(torch.full((3, 1), 5, device=where), past_key_values=cache).logits.cpu()

    torch.testing.assert_close(run(llamas.remote().to(device), device), run(llamas.local(), "cpu"))


def test_a_training_step(llamas: Both, device: torch.device) -> None:
    ours, theirs = trained(with_lora(llamas.remote()).to(device), device), trained(with_lora(llamas.local()), "cpu")
    assert len(ours) == 21
    torch.testing.assert_close(ours, theirs)


def test_a_trained_prefix(llamas: Both, device: torch.device) -> None:
    def run(model: Any, where: torch.device | str) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return trained(peft.get_peft_model(model, config).to(where), where)

    torch.testing.assert_close(run(llamas.remote(), device), run(llamas.local(), "cpu"))
