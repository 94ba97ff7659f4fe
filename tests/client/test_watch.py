"""What a decode step notices of changes to adapters, and what noticing costs."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import client
from client.adapters.bundle import Snapshot
from client.adapters.dropout import BlockDropout
from client.adapters.source import AdapterSource
from client.ghosts.blocks import make_ghosts
from client.ghosts.questions import Subtracted
from protocol.errors import BadAdapter

BLOCKS = 4
ALL = range(BLOCKS)


class Model:
    """A model whose blocks are ghosts, and the source of its adapters."""

    def __init__(self, blocks: int = BLOCKS, config: peft.PeftConfig | None = None):
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 16}
        with torch.device("meta"):
            self.plain: Any = LlamaForCausalLM._from_config(LlamaConfig(num_hidden_layers=blocks, **sizes))
        self.plain.model.layers = self.layers = make_ghosts(self.plain.model.layers, None)  # type: ignore[arg-type]
        self.layers.attach(nn.Identity())
        self.plain.requires_grad_(False)
        self.source = AdapterSource(self.plain, self.layers)
        self.tuned: Any = peft.get_peft_model(self.plain, config) if config else self.plain
        self.tuned.eval()
        self.source.snapshot(fresh=True, training=False)

    def step(self) -> Snapshot | None:
        """What a decode step asks."""
        return self.source.snapshot(fresh=False, training=False)

    def layer(self, block: int = 2, name: str = "q_proj") -> Any:
        """PEFT's layer on a projection of a block."""
        return getattr(self.layers.get_submodule(f"{block}.self_attn"), name)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "init_lora_weights": False} | options
    )


def content(snapshot: Snapshot | None) -> tuple[bytes, bool] | None:
    """What peers would be sent."""
    bundle = snapshot.bundle(ALL) if snapshot else None
    return (bundle.key, bool(snapshot and snapshot.has_dropout)) if bundle else None


def _add(model: Model) -> None:
    model.tuned.add_adapter("second", lora(r=2))
    model.tuned.set_adapter("second")


def _delete(model: Model) -> None:
    model.tuned.delete_adapter("default")


def _disable_one(model: Model) -> None:
    model.layer().enable_adapters(False)


def _empty_the_list(model: Model) -> None:
    """As a list that the layer holds, which is changed in place."""
    model.layer()._active_adapter.remove("default")


def _scale(model: Model) -> None:
    model.layer().scaling["default"] = 0.25


def _edit(model: Model) -> None:
    with torch.no_grad():
        model.layer().lora_B["default"].weight.add_(1)


def _replace_parameter(model: Model) -> None:
    weight = model.layer().lora_B["default"].weight
    model.layer().lora_B["default"].weight = nn.Parameter(weight.detach() + 1)


def _replace_module(model: Model) -> None:
    model.layer().lora_B["default"] = nn.Linear(4, 32, bias=False)


def _freeze(model: Model) -> None:
    model.layer().lora_A["default"].weight.requires_grad_(False)


def _drop_live(model: Model) -> None:
    for module in model.layers.modules():
        if isinstance(module, nn.Dropout):
            module.train()


def _subtract(model: Model) -> None:
    model.layer().base_layer.weight.subtracted = Subtracted(torch.ones(32, 2), torch.ones(2, 32))


CHANGES = [_add, _delete, _disable_one, _empty_the_list, _scale, _edit, _replace_parameter, _replace_module, _freeze,
           _drop_live, _subtract]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["", "copy"])
def test_a_decode_step_notices(change: Callable[[Model], None], copied: bool) -> None:
    """In a copy of a model that has been used, too. What a step then finds is what one finds who knows nothing."""
    original = Model(config=lora())
    model = copy.deepcopy(original) if copied else original
    before = model.step()
    assert model.step() is before
    old = content(before)
    change(model)
    after = model.step()
    assert after is not before
    assert model.step() is after
    assert content(after) != old
    model.source._watch = None
    assert content(model.source.snapshot(fresh=True, training=False)) == content(after)
    if copied:
        assert content(original.step()) == old


def test_the_first_adapter_is_noticed() -> None:
    model = Model()
    assert model.step() is None
    model.tuned = peft.get_peft_model(model.plain, lora())
    assert model.step() is not None


@pytest.mark.parametrize("change", ["child", "name"])
def test_members_that_come_where_none_were(change: str) -> None:
    """In a module without children, and one in the place of another that was None: both are strangers here."""
    model = Model()
    projection = model.layer()
    if change == "child":
        projection.own = nn.Linear(2, 2)
    else:
        del projection._parameters["bias"]
        projection.register_parameter("own", nn.Parameter(torch.ones(1)))
    with pytest.raises(BadAdapter, match=r"2\.self_attn\.q_proj\.own was put into the remote blocks"):
        model.step()


def test_values_are_read_anew_where_versions_are_not_trusted() -> None:
    model = Model(config=lora())
    before = content(model.step())
    weight = model.layer().lora_B["default"].weight
    weight.data = weight.data + 1
    assert content(model.step()) == before
    assert content(model.source.snapshot(fresh=True, training=False)) != before


@pytest.mark.parametrize("config", [None, lora()], ids=["none", "lora"])
def test_a_decode_step_asks_few_questions(config: peft.LoraConfig | None) -> None:
    """As few for many blocks as for a few: each is a call of Python's, of hundreds that a step once made."""
    root = str(Path(client.__file__).parent)
    counts = []
    for blocks in (2, 12):
        model = Model(blocks, config)
        dropout, calls = BlockDropout(model.layers), list[str]()
        dropout.is_live()

        def note(frame: FrameType, event: str, _: Any, calls: list[str] = calls) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(root):
                calls.append(frame.f_code.co_qualname)

        sys.setprofile(note)
        try:
            model.step()
            dropout.is_live()
        finally:
            sys.setprofile(None)
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 7
