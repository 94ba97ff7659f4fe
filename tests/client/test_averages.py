"""Averages of adapters over training (EMA, SWA): what this machine holds is averaged, the blocks stay what they are."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch.optim import swa_utils

from client.ghosts.questions import RemoteWeightError
from tests.tools.arena import one
from tests.tools.swarm import Both

IDS = one()["input_ids"]


@pytest.fixture(scope="module")
def model(llamas: Both) -> Any:
    return llamas.remote()


WAYS: dict[str, dict[str, Any]] = {
    "swa": {},
    "swa, lists": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.6)},
    "ema, lists": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.6)},
    "ema of buffers, too": {"avg_fn": swa_utils.get_ema_avg_fn(0.999), "use_buffers": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_averaged_adapters(way: str, dora: bool, llamas: Both) -> None:
    def run(model: Any) -> torch.Tensor:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora, init_lora_weights=dora)
        tuned = peft.get_peft_model(model, config)
        averaged = swa_utils.AveragedModel(tuned, **WAYS[way])
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            tuned(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            averaged.update_parameters(tuned)
        with torch.no_grad():
            logits = averaged(input_ids=IDS).logits
            assert not torch.equal(logits, tuned(input_ids=IDS).logits)
        return logits  # type: ignore[no-any-return]

    torch.testing.assert_close(run(llamas.remote()), run(llamas.local()))


def test_only_averages_of_a_weight_with_itself(model: Any) -> None:
    layers = copy.deepcopy(model).model.layers
    one, other, bias = layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight, layers[0].input_layernorm.weight
    with torch.no_grad():
        one.copy_(model.model.layers[0].mlp.up_proj.weight)
        bias.lerp_(model.model.layers[0].input_layernorm.weight, 0.5)
        for attempt in (
            lambda: one.copy_(other),
            lambda: one.copy_(torch.zeros(one.shape)),
            lambda: one.copy_(one * 2),
            lambda: one.copy_(0.5 * one + 0.5 * other),
            lambda: torch.nn.Parameter(one * 0.5),
            lambda: (one * 0.5).sum(),
            lambda: one * one,
            lambda: torch._foreach_lerp_([torch.ones(1), one], [torch.ones(1), other], 0.5),
            lambda: torch._foreach_lerp_([torch.ones(one.shape)], [one], 0.5),
        ):
            with pytest.raises(RemoteWeightError, match="lives on remote peers"):
                attempt()
