"""Merging an adapter that was trained on text into a model that sees as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from client.merge.run import merge_adapter
from tests.tools.families import MULTIMODAL_FAMILIES
from tests.tools.parity import local_model, padded_batch


@pytest.mark.parametrize("family", MULTIMODAL_FAMILIES)
@torch.no_grad()
def test_it_stays_a_model_that_sees(models: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Also where the adapter was trained on its language model alone, as Transformers loads Llama 4 for text."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(local_model(models(family)), config)
    trained.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", models(family), tmp_path / "out")
    batch = padded_batch()
    assert torch.equal(local_model(tmp_path / "out")(**batch).logits, trained.merge_and_unload()(**batch).logits)
    whole: Any = tf.AutoModelForMultimodalLM
    merged, info = whole.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = whole.from_pretrained(models(family)).state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("q_proj" in key or "o_proj" in key for key in changed)
