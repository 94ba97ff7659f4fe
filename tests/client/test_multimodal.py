"""Models that see as well as read, and text that goes through their language model."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import client
from protocol.errors import BadUsage, UnsupportedModel
from tests.tools.parity import padded_batch
from tests.tools.swarm import ForkServer, Swarm, new_swarm

GEMMA = "gemma3_full"


@pytest.fixture(scope="module")
def gemma(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[Swarm]:
    with new_swarm(fork_server) as swarm:
        swarm.serve(models(GEMMA), "0:5")
        yield swarm


@pytest.fixture(scope="module")
def remote(gemma: Swarm, models: Callable[[str], Path]) -> Any:
    return gemma.connect(models(GEMMA))


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification"])
def test_every_class_of_the_family(name: str, gemma: Swarm, models: Callable[[str], Path]) -> None:
    local = getattr(transformers, name).from_pretrained(models(GEMMA)).eval()
    torch.manual_seed(0)
    ours = getattr(client, f"Distributed{name}").from_pretrained(str(models(GEMMA)), initial_peers=gemma.initial_peers)
    if hasattr(local, "score"):
        ours.score.load_state_dict(local.score.state_dict())  # a new head is random
    batch = padded_batch()
    seen = batch["attention_mask"].bool() if not hasattr(local, "score") else ...
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits[seen], local(**batch).logits[seen])


def test_a_class_that_transformers_cannot_load_from_it(gemma: Swarm, models: Callable[[str], Path]) -> None:
    """Transformers gives it random weights, and says so in a log only."""
    _, info = transformers.Gemma3ForCausalLM.from_pretrained(models(GEMMA), output_loading_info=True)
    assert "model.norm.weight" in info["missing_keys"]
    with pytest.raises(UnsupportedModel, match=r"lacks weights that Gemma3ForCausalLM needs, .*; use the class of"):
        client.DistributedGemma3ForCausalLM.from_pretrained(str(models(GEMMA)), initial_peers=gemma.initial_peers)


def test_what_stands_for_text_goes_along(remote: Any, models: Callable[[str], Path]) -> None:
    """As processors give it; and trainers, where Transformers asks for it."""
    local = transformers.AutoModelForCausalLM.from_pretrained(models(GEMMA)).eval()
    batch = padded_batch()
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.allclose(remote(**batch).logits[seen], local(**batch).logits[seen], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "^pixel_values is for images, sound or the like, and only text"),
        ({"token_type_ids": torch.ones(2, 20, dtype=torch.long)}, "^token_type_ids is for images"),
        (
            {"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool)},
            "^attention_mask is a dict; through a swarm it must be 2-D",
        ),
        ({"position_ids": torch.stack([torch.arange(20)[None], torch.ones(1, 20)])}, "^position_ids differ along time"),
    ],
)
def test_anything_but_text_is_refused(remote: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadUsage, match=said):
        remote(**padded_batch() | given)


def test_what_a_client_has_of_it_is_saved_and_loaded(remote: Any, gemma: Swarm, tmp_path: Path) -> None:
    remote.save_pretrained(tmp_path / "saved")
    again = gemma.connect(tmp_path / "saved")
    sees = {name for name in again.state_dict() if "vision_tower" in name}
    assert sees
    assert all(torch.equal(again.state_dict()[name], remote.state_dict()[name]) for name in sees)
    with torch.no_grad():
        assert torch.equal(again(**padded_batch()).logits, remote(**padded_batch()).logits)


@pytest.mark.parametrize("kind", ["internlm3", "iquestcoder"])
def test_a_name_for_which_transformers_has_another_familys_class(
    kind: str, swarm: Swarm, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models("llama"), tmp_path / kind)
    settings = transformers.AutoConfig.from_pretrained(folder).to_dict() | {"model_type": kind}
    transformers.AutoConfig.for_model(**settings).save_pretrained(folder)
    local = transformers.AutoModelForCausalLM.from_pretrained(folder)
    swarm.serve(folder, "0:5")
    remote = swarm.connect(folder)
    assert type(remote) is type(local) is transformers.LlamaForCausalLM
    ids = padded_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(remote(ids).logits, local(ids).logits)
