"""Dropout through a swarm is what the modules say now, not what configurations said once."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from protocol.errors import BadAdapter, BadUsage, SwarmError
from tests.tools.swarm import Both, ForkServer, new_swarm

IDS = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(1))
RATE = 0.3


@pytest.fixture(scope="module")
def made(fork_server: ForkServer, models: Callable[[str], Path], tmp_path_factory: Any) -> Iterator[dict[str, Both]]:
    """A llama, and a GPT-2 that has dropout of its own."""
    folder = shutil.copytree(models("gpt2"), tmp_path_factory.mktemp("drops") / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    rates = {"attn_pdrop": RATE, "resid_pdrop": RATE, "embd_pdrop": RATE}
    (folder / "config.json").write_text(json.dumps(config | rates))
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:5")
        swarm.serve(folder, "0:2", "2:5")
        yield {"llama": Both(models("llama"), swarm), "gpt2": Both(folder, swarm)}


@pytest.fixture
def llama(made: dict[str, Both]) -> Both:
    return made["llama"]


@pytest.fixture
def gpt2(made: dict[str, Both]) -> Both:
    return made["gpt2"]


def with_lora(model: Any, **options: Any) -> Any:
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def drops(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def set_rate(model: nn.Module, rate: float) -> None:
    """With 0 what TRL's preference and reward trainers do at their start."""
    for module in drops(model):
        module.p = rate


def evaluate(model: nn.Module) -> None:
    for module in drops(model):
        module.eval()


def remove(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, nn.Identity())


def losses(model: Any) -> list[float]:
    return [model(IDS, labels=IDS).loss.item() for _ in range(2)]


def is_random(model: Any) -> bool:
    first, second = losses(model)
    return first != second


@pytest.mark.parametrize(
    "off", [lambda model: set_rate(model, 0), evaluate, remove], ids=["rate", "evaluate", "remove"]
)
def test_an_adapters_dropout_switched_off(off: Callable[[nn.Module], None], llama: Both) -> None:
    tuned, local = with_lora(llama.remote(), lora_dropout=RATE).train(), with_lora(llama.local()).train()
    assert is_random(tuned)
    off(tuned)
    assert losses(tuned) == losses(local)


def test_an_adapters_dropout_alone_is_live(llama: Both) -> None:
    """Monte Carlo dropout: the model is evaluated, its dropout drops."""
    tuned = with_lora(llama.remote(), lora_dropout=RATE).eval()
    assert not is_random(tuned)
    for module in drops(tuned):
        module.train()
    assert is_random(tuned)


@pytest.mark.parametrize("off", [lambda model: set_rate(model, 0), evaluate], ids=["rate", "evaluate"])
def test_the_blocks_dropout_switched_off(off: Callable[[nn.Module], None], gpt2: Both) -> None:
    tuned, local = with_lora(gpt2.remote()).train(), with_lora(gpt2.local()).eval()
    set_rate(tuned.get_base_model().transformer.drop, 0)  # that of the embeddings is on this machine
    assert is_random(tuned)
    off(tuned)
    assert losses(tuned) == losses(local)


def _another_rate(model: Any) -> Any:
    set_rate(model, 0.1)
    return model


def _some(model: Any) -> Any:
    model.transformer.h[3].eval()
    return model


def _an_adapters_only(model: Any) -> Any:
    set_rate(model, 0)
    return with_lora(model, lora_dropout=RATE)


def _some_of_an_adapters(model: Any) -> Any:
    tuned = with_lora(model, lora_dropout=RATE)
    model.transformer.h[3].attn.c_attn.lora_dropout.eval()
    return tuned


REFUSED: dict[Callable[[Any], Any], tuple[type[SwarmError], str]] = {
    _another_rate: (BadUsage, r"0\.attn\.attn_dropout is at 0\.1 instead of 0\.3"),
    _some: (BadUsage, r"3\.attn\.attn_dropout is at 0\.0 instead of 0\.3"),
    _an_adapters_only: (BadUsage, "while the blocks' own is off"),
    _some_of_an_adapters: (BadAdapter, "other dropout on some modules"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_peers_cannot_drop_is_refused(change: Callable[[Any], Any], gpt2: Both) -> None:
    kind, words = REFUSED[change]
    model = change(gpt2.remote().train())
    with pytest.raises(kind, match=words):
        losses(model)
