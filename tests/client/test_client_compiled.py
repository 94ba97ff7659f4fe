"""`torch.compile` of a model through a swarm: what is on this machine is compiled, the swarm is called as ever."""

import logging
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

from tests.tools.swarm import Both

IDS = torch.arange(3, 13).reshape(2, 5)


@pytest.fixture(autouse=True)
def fresh_compiler(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING, "torch.__trace")  # thousands of records
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any) -> Any:
    """As `Trainer(torch_compile=True)` has it, but for the backend: the one that makes code takes half a minute."""
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def test_training(llamas: Both) -> None:
    def gradients(model: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = compiled(peft.get_peft_model(model, config).train())
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in tuned.parameters() if p.grad is not None)]

    ours, theirs = gradients(llamas.remote()), gradients(llamas.local())
    assert len(ours) == len(theirs) > 5
    assert all(map(torch.equal, ours, theirs))


def test_generating(llamas: Both) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ours = compiled(llamas.remote()).generate(IDS, **options)
    assert torch.equal(ours, llamas.local().generate(IDS, **options))
