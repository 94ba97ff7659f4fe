"""LoRA on parameters themselves, such as fused experts; PEFT wraps their module once for every parameter.

`test_methods.py` has Mixtral, where `all-linear` comes to this; here GPT-OSS, whose experts are a leaf module.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale

from peer.adapters.store import AdapterStore
from peer.span.loading import load_span
from protocol.errors import BadAdapter
from protocol.model.checkpoint import open_checkpoint
from tests.tools.methods import adapted, batch_for, load, logits, train, trainable
from tests.tools.swarm import ForkServer, new_swarm

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
TASK = "CAUSAL_LM"
Make = Callable[[], Any]


@pytest.fixture(scope="module")
def path(models: Callable[[str], Path]) -> Path:
    return models("gpt_oss")


@pytest.fixture(scope="module")
def connect(fork_server: ForkServer, path: Path) -> Iterator[Make]:
    """Makes a model through the swarm."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(path, "0:2", "2:5")
        yield lambda: load(path, TASK, swarm.initial_peers)


@pytest.fixture
def local(path: Path) -> Make:
    """Makes the plain model."""
    return lambda: load(path, TASK, None)


def lora(*parameters: str, **options: Any) -> peft.LoraConfig:
    chosen = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": list(parameters)}
    return peft.LoraConfig(**chosen | {"task_type": TASK} | options)


CONFIGS = {
    "one parameter": lora(UP),
    # After the one above: a peer must nest these as if that had never been.
    "both": lora(UP, DOWN),
    "patterns": lora(
        UP, DOWN, "experts.gate_up_proj_bias", target_modules=[], use_rslora=True,
        rank_pattern={r".*\.1\..*down_proj": 5}, alpha_pattern={r".*\.3\..*gate_up_proj": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_experts_as_locally(config: peft.LoraConfig, connect: Make, local: Make, tmp_path: Path) -> None:
    """Losses, logits, gradients and parameters of three steps; saved and loaded both ways."""
    ours, theirs = adapted(connect(), config), adapted(local(), config)
    found, expected = train(ours, TASK, "LoRA"), train(theirs, TASK, "LoRA")
    assert len(found) == len(expected) > 6
    assert all(map(torch.equal, found, expected))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    after = logits(theirs, TASK)
    for model, folder in ((local(), "ours"), (connect(), "theirs")):
        assert torch.equal(logits(peft.PeftModel.from_pretrained(model, tmp_path / folder).eval(), TASK), after)


def test_adapters_on_experts_switched_and_scaled(connect: Make, local: Make) -> None:
    """Two adapters: one, the other, none, both, half as strong; greedy tokens."""

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora(UP, DOWN, init_lora_weights=False)).eval()
        tuned.add_adapter("second", lora(UP, DOWN, r=3, target_modules=["v_proj"], init_lora_weights=False))
        found = [logits(tuned, TASK)]
        tuned.set_adapter("second")
        found.append(logits(tuned, TASK))
        with tuned.disable_adapter():
            found.append(logits(tuned, TASK))
        tuned.base_model.set_adapter(["default", "second"])
        found.append(logits(tuned, TASK))
        with rescale_adapter_scale(tuned, 0.5):
            found.append(logits(tuned, TASK))
        inputs = {name: value for name, value in batch_for(TASK).items() if name != "labels"}
        return [*found, tuned.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)]

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours, theirs))
    assert len({float(found.sum()) for found in ours}) == 6


def test_one_users_experts_leave_anothers_kept_activations_alone(connect: Make, local: Make) -> None:
    """LoRA on a parameter takes it out of its module for a moment, and others' graphs refer to it."""
    gradients = []
    for model in (local(), connect()):
        tuned = adapted(model, lora()).train()
        loss = tuned(**batch_for(TASK)).loss
        adapted(connect(), lora(UP, DOWN)).train()(**batch_for(TASK)).loss.backward()
        loss.backward()
        gradients.append([parameter.grad for _, parameter in trainable(tuned)])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("quantization", "parameter", "rank", "said"),
    [
        ("none", "1.mlp.experts.gate_up_proj", 4096, "bytes is over this peer's limit"),
        ("none", "1.mlp.experts.gate_up_proj_bias", "4", "expected an integer"),
        ("none", "1.mlp.experts", 4, "no unquantized parameter"),
        ("none", "1.input_layernorm.weight", 4, "no unquantized parameter"),
        ("nf4", "1.self_attn.q_proj.weight", 4, "no unquantized parameter"),
    ],
)
def test_what_a_peer_refuses_before_peft_allocates(
    path: Path, quantization: str, parameter: str, rank: Any, said: str
) -> None:
    span = load_span(open_checkpoint(str(path)), 1, 2, quantization=quantization)
    spec = {"name": "default", "method": "LORA", "options": {"r": rank}, "parameters": [parameter]}
    manifest = json.dumps({"adapters": [spec], "scaling": {}, "tensors": {}, "trainable": []})
    with pytest.raises(BadAdapter, match=said):
        AdapterStore(span, 2**20, 64, 2**20).put(manifest, {}, client="it")
