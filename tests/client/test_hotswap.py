"""PEFT's hot-swapping: another adapter's values in the place of those that are there, of another rank and scaling."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from tests.tools import arena
from tests.tools.swarm import Both

BATCH = {name: arena.batch()[name] for name in ("input_ids", "attention_mask")}


def adapter(model: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **options)
    config.init_lora_weights = False
    return peft.get_peft_model(model, config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**BATCH).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("with_patterns", [False, True], ids=["", "patterns"])
def test_an_adapter_swapped_in_place(prepared: bool, with_patterns: bool, llamas: Both, tmp_path: Path) -> None:
    """For one of a higher rank and another scaling, and back (PEFT 2177)."""
    patterns: dict[str, Any] = {"rank_pattern": {"v_proj": 3}} if with_patterns else {}
    for name, rank in (("low", 2), ("high", 8)):
        adapter(llamas.local(), r=rank, **patterns).save_pretrained(tmp_path / name)

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = peft.PeftModel.from_pretrained(model, tmp_path / "low")
        found = [logits(tuned)]
        if prepared:
            prepare_model_for_compiled_hotswap(tuned, target_rank=8)
            found.append(logits(tuned))
        for name in ("high", "low"):
            hotswap_adapter(tuned, str(tmp_path / name), adapter_name="default")
            found += [logits(tuned), tuned.generate(**BATCH, max_new_tokens=3)]
        return found

    theirs, ours = outputs(llamas.local()), outputs(llamas.remote())
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], ours[-4])
