"""Blocks that are changed after loading: as on one machine, or refused; never other blocks without a word."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from protocol.errors import BadAdapter, BadUsage
from tests.tools.arena import one
from tests.tools.swarm import Both

IDS = one()["input_ids"]


def _fewer_by_the_configuration(model: Any) -> None:
    model.config.num_hidden_layers = 2


def _none_at_the_end(model: Any) -> None:
    del model.model.layers[3:]


def _popped(model: Any) -> None:
    model.model.layers.pop(-1)


@pytest.mark.parametrize("change", [_fewer_by_the_configuration, _none_at_the_end, _popped])
@pytest.mark.parametrize("used", [False, True], ids=["", "used"])
def test_blocks_left_out_at_the_end(change: Callable[[Any], None], used: bool, llamas: Both) -> None:
    """A forward, tokens from a cache, and gradients of an adapter on what is left."""

    def run(model: Any) -> list[torch.Tensor]:
        if used:
            model.generate(**one())
        change(model)
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
        tokens = model.generate(**one())
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 1], init_lora_weights=False)
        tuned = peft.get_peft_model(model, config)
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        return [logits, tokens, *(p.grad for p in tuned.parameters() if p.grad is not None)]

    ours, theirs = run(llamas.remote()), run(llamas.local())
    assert len(ours) == len(theirs) == 6
    assert all(map(torch.equal, ours, theirs))


def test_a_cache_of_more_blocks(llamas: Both) -> None:
    model = llamas.remote()
    with torch.no_grad():
        cache = model(input_ids=IDS).past_key_values
        model.config.num_hidden_layers = 2
        with pytest.raises(BadUsage, match="This cache is of 5 blocks, and the model has 2 now"):
            model(input_ids=IDS[:, :1], past_key_values=cache)


def _deleted(layers: Any) -> None:
    del layers[1]


def _swapped(layers: Any) -> None:
    layers[1], layers[2] = layers[2], layers[1]


def _repeated(layers: Any) -> None:
    layers.append(layers[4])


def _put_between(layers: Any) -> None:
    layers.insert(1, copy.deepcopy(layers[0]))


def _parts_swapped(layers: Any) -> None:
    layers[1].mlp, layers[2].mlp = layers[2].mlp, layers[1].mlp


def _part_shared(layers: Any) -> None:
    layers[2].mlp = layers[1].mlp


def _part_removed(layers: Any) -> None:
    layers[2].mlp = None


def _weights_shared(layers: Any) -> None:
    layers[2].mlp.down_proj.weight = None


def _one_replaced(layers: Any) -> None:
    layers[1] = nn.Identity()


def _looks_ahead(layers: Any) -> None:
    layers[3].self_attn.is_causal = False


def _scaled(layers: Any) -> None:
    layers[3].self_attn.scaling *= 2


CHANGES: dict[Callable[[Any], None], str] = {
    _deleted: "1 was removed from the remote blocks, moved or replaced",
    _swapped: "1 was removed",
    _repeated: "5 was removed",
    _put_between: "1 was put into the remote blocks",
    _parts_swapped: r"1\.mlp was removed",
    _part_shared: r"2\.mlp was removed",
    _part_removed: r"2\.mlp was removed",
    _weights_shared: r"2\.mlp\.down_proj\.weight was removed",
    _one_replaced: "1 was put into the remote blocks",
    _looks_ahead: r"3\.self_attn\.is_causal was True when the model was loaded, and is False; peers run",
    _scaled: r"3\.self_attn\.scaling was 0\.35.*, and is 0\.7",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapter"])
def test_blocks_in_another_order_or_of_another_kind(change: Callable[[Any], None], adapted: bool, llamas: Both) -> None:
    model = llamas.remote()
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"])) if adapted else model
    change(model.model.layers)
    with torch.no_grad(), pytest.raises((BadUsage, BadAdapter), match=f"^{CHANGES[change]}") as caught:
        tuned(input_ids=IDS)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def _new_list(model: Any) -> Any:
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 2, 4)])
    return model


def _replicated(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 3], [2, 5]]))


@pytest.mark.parametrize("change", [_new_list, _replicated])
def test_another_list_of_blocks(change: Callable[[Any], Any], llamas: Both) -> None:
    changed = change(llamas.remote())
    with torch.no_grad(), pytest.raises(BadUsage, match=r"^The list of blocks was replaced.*layers\[8:\]\.$"):
        changed(input_ids=IDS)


def test_a_configuration_that_changes_masks(llamas: Both) -> None:
    model = llamas.remote()
    model.config.is_causal = False
    with pytest.raises(BadUsage, match=r"^config\.is_causal was None when the model was loaded, and is False"):
        model.generate(**one())


def test_every_second_block(llamas: Both) -> None:
    with pytest.raises(BadUsage, match="Remote blocks run in their order"):
        llamas.remote().model.layers[::2]
