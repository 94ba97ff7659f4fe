"""Every family over three real peers equals plain local Transformers + PEFT."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import FAMILIES, MULTIMODAL_FAMILIES
from tests.tools.parity import differences, local_model
from tests.tools.swarm import Swarm

TARGETS = {
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value"],
    "falcon": ["query_key_value"],
    "phi3": ["qkv_proj"],
    "deepseek_v3": ["kv_b_proj", "o_proj"],
}


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL_FAMILIES])
def test_logits_tokens_loss_and_gradients(family: str, models: Callable[[str], Path], swarm: Swarm) -> None:
    path = models(family)
    swarm.serve(path, "0:2", "2:3", "3:5")
    remote, local = swarm.connect(path), local_model(path)
    assert type(remote) is type(local)
    assert differences(remote, local, TARGETS.get(family, ["q_proj", "v_proj"])) == {}
