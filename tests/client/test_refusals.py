"""What cannot work through a swarm is refused in one sentence that a user understands."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from client.ghosts.questions import RemoteWeightError
from protocol.errors import BadAdapter, BadUsage, SwarmError
from tests.tools.swarm import Both


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | options,
        task_type="CAUSAL_LM",
    )


def adapted(model: Any, config: peft.PeftConfig) -> Any:
    return peft.get_peft_model(model, config)


def _forward(model: Any) -> Any:
    return model(**batch())


def _bias(model: Any) -> Any:
    return _forward(adapted(model, lora(bias="all")))


def _layer_norms(model: Any) -> Any:
    return _forward(adapted(model, peft.LNTuningConfig(task_type="CAUSAL_LM")))


def _unknown_method(model: Any) -> Any:
    return _forward(adapted(model, peft.PolyConfig(r=4, n_tasks=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))


def _merge(model: Any) -> Any:
    return adapted(model, lora()).merge_adapter()


def _merge_and_unload(model: Any) -> Any:
    return adapted(model, lora()).merge_and_unload()


def _adapter_per_row(model: Any) -> Any:
    tuned = adapted(model, lora()).eval()
    _forward(tuned)
    return tuned(**batch(), adapter_names=["default", "default", "__base__", "__base__"])


def _activated_lora(model: Any) -> Any:
    return _forward(adapted(model, lora(alora_invocation_tokens=[5, 6])))


def _several_methods(model: Any) -> Any:
    mixed = peft.get_peft_model(model, lora(), mixed=True)
    mixed.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["up_proj"]))
    mixed.set_adapter(["default", "second"])
    return _forward(mixed)


def _continuous_batching(model: Any) -> Any:
    return adapted(model, lora()).generate_batch([[3, 4, 5], [6, 7]], max_new_tokens=2)


def _twice(model: Any) -> Any:
    """What is refused is refused again, not left out the second time."""
    tuned = adapted(model, lora(bias="all"))
    with pytest.raises(BadAdapter):
        _forward(tuned)
    return _forward(tuned)


def _two_orders(model: Any) -> Any:
    tuned = adapted(model, lora())
    tuned.add_adapter("second", lora())
    tuned.base_model.set_adapter(["default", "second"])
    model.model.layers[3].self_attn.q_proj.set_adapter(["second", "default"])
    return _forward(tuned)


def _train_a_block(model: Any) -> Any:
    _forward(model)
    model.model.layers[3].mlp.down_proj.weight.requires_grad_(True)
    return _forward(model)


def _adaption_prompt(model: Any) -> Any:
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    return _forward(peft.get_peft_model(model, config))


def _own_module(model: Any) -> Any:
    _forward(model)
    model.model.layers[2].mlp.act_fn = torch.nn.Identity()
    return _forward(model)


def _own_module_under_an_adapter(model: Any) -> Any:
    model.model.layers[2].mlp.down_proj = torch.nn.Linear(64, 32)
    return _forward(adapted(model, lora()))


def _own_weight(model: Any) -> Any:
    tuned = adapted(model, lora())
    tuned.base_model.model.model.layers[2].mlp.down_proj.base_layer.weight = torch.nn.Parameter(torch.zeros(32, 64))
    return _forward(tuned)


def _backward_hook(model: Any) -> Any:
    model.model.layers[1].mlp.register_full_backward_hook(lambda *args: None)
    return _forward(model)


def _hidden_states(model: Any) -> Any:
    return model(**batch(), output_hidden_states=True)


def _attentions(model: Any) -> Any:
    return model.generate(**batch(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def _static_cache(model: Any) -> Any:
    return model.generate(**batch(), max_new_tokens=2, cache_implementation="static")


def _mask_4d(model: Any) -> Any:
    return model(input_ids=batch()["input_ids"], attention_mask=torch.zeros(4, 1, 12, 12))


def _keys_of_a_cache(model: Any) -> Any:
    return [keys.shape for keys, *_ in _forward(model).past_key_values]


def _one_dimension(model: Any) -> Any:
    return model(input_ids=batch()["input_ids"][0])


def _no_rows(model: Any) -> Any:
    return model(input_ids=batch()["input_ids"][:0])


def _no_tokens(model: Any) -> Any:
    return model(input_ids=batch()["input_ids"][:, :0])


def _blocks_called_without_rows(model: Any) -> Any:
    return model.model.layers(torch.zeros(4, 32))


def _random_dora(model: Any) -> Any:
    return adapted(model, lora(use_dora=True))


def _arithmetic(model: Any) -> Any:
    return model.model.layers[0].mlp.down_proj.weight + 1


REFUSED: dict[Callable[[Any], Any], tuple[type[SwarmError], str]] = {
    _bias: (BadAdapter, "bias"),
    _twice: (BadAdapter, "bias"),
    _layer_norms: (BadAdapter, "cannot be trained"),
    _unknown_method: (BadAdapter, "POLY"),
    _merge: (RemoteWeightError, "lives on remote peers"),
    _merge_and_unload: (RemoteWeightError, "lives on remote peers"),
    _adapter_per_row: (BadUsage, "adapter_names"),
    _activated_lora: (BadUsage, "aLoRA"),
    _several_methods: (BadAdapter, "LOHA, LORA"),
    _continuous_batching: (BadUsage, "generate_batch"),
    _two_orders: (BadAdapter, "in one order"),
    _train_a_block: (BadAdapter, r"3\.mlp\.down_proj\.weight.* cannot be trained"),
    _adaption_prompt: (BadAdapter, r"3\.self_attn was put into the remote blocks"),
    _own_module: (BadAdapter, r"2\.mlp\.act_fn was put into"),
    _own_module_under_an_adapter: (BadAdapter, r"2\.mlp\.down_proj\.base_layer was put into"),
    _own_weight: (BadAdapter, r"2\.mlp\.down_proj\.base_layer\.weight was put into"),
    _backward_hook: (BadUsage, "Hooks on modules of the remote blocks never run"),
    _hidden_states: (BadUsage, "output_hidden_states"),
    _attentions: (BadUsage, "output_attentions"),
    _static_cache: (BadUsage, "StaticCache"),
    _mask_4d: (BadUsage, "4 dimensions"),
    _keys_of_a_cache: (BadUsage, "keys and values of this cache"),
    _one_dimension: (BadUsage, r"shape \[12, 32\]; expected"),
    _no_rows: (BadUsage, "at least one token"),
    _no_tokens: (BadUsage, "at least one token"),
    _blocks_called_without_rows: (BadUsage, r"shape \[4, 32\]; expected"),
    _random_dora: (RemoteWeightError, "init_lora_weights=True, or load it by PeftModel and low_cpu_mem_usage=True"),
    _arithmetic: (RemoteWeightError, "lives on remote peers"),
}


@pytest.mark.parametrize("attempt", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(attempt: Callable[[Any], Any], llamas: Both) -> None:
    kind, words = REFUSED[attempt]
    with pytest.raises(kind, match=words) as caught:
        attempt(llamas.remote())
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 300
