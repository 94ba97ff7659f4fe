"""PiSSA and OLoRA beyond the matrix of methods: peers keep their weights, the client works with residuals."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.config import LoraGAConfig

from client.ghosts.questions import RemoteWeightError
from client.ghosts.tensor import GhostTensor
from protocol.errors import BadAdapter, BadUsage
from tests.tools.swarm import Swarm

Make = Callable[[], Any]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def remote(llama_swarm: tuple[Path, Swarm]) -> Make:
    path, swarm = llama_swarm
    return lambda **options: swarm.connect(path, **options)


@pytest.fixture(scope="module")
def local(models: Callable[[str], Path]) -> Make:
    return lambda **options: transformers.AutoModelForCausalLM.from_pretrained(models("llama"), **options)


def lora(init: Any, **options: Any) -> peft.LoraConfig:
    whole = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(init_lora_weights=init, **whole)


def tuned(model: Any, *configs: peft.LoraConfig) -> Any:
    """With adapters 0, 1, ..., all moved away from where they began; the last is active."""
    torch.manual_seed(3)
    for number, config in enumerate(configs):
        if number:
            model.add_adapter(str(number), copy.deepcopy(config))
        else:
            model = peft.get_peft_model(model, copy.deepcopy(config), adapter_name="0")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.set_adapter(str(len(configs) - 1))
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(ids).logits  # type: ignore[no-any-return]


def same(mine: torch.Tensor, reference: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(mine, reference, rtol=0, atol=atol)


INITS = ["pissa", "olora", "pissa_niter_3"]


@pytest.mark.parametrize("init", INITS)
def test_factors_are_what_they_are_locally(init: str, remote: Make, local: Make) -> None:
    pair = []
    for make in (remote, local):
        torch.manual_seed(5)
        pair.append(peft.get_peft_model(make(), lora(init, rank_pattern={"layers.3.*q_proj": 2})))
    mine, reference = ({n: p for n, p in model.named_parameters() if "lora_" in n} for model in pair)
    assert mine.keys() == reference.keys()
    for name, parameter in mine.items():
        same(parameter, reference[name], atol=1e-6)
    same(logits(pair[0]), logits(pair[1]))


def test_a_rank_beyond_that_of_the_weights(remote: Make, local: Make) -> None:
    """PEFT then makes an adapter of as many factors as there are, whatever its configuration says."""
    mine, reference = (peft.get_peft_model(make(), lora("pissa", r=300)) for make in (remote, local))
    same(logits(mine), logits(reference))


@pytest.mark.parametrize("init", INITS[:2])
def test_what_was_subtracted_is_the_weights_and_not_an_adapters(init: str, remote: Make, local: Make) -> None:
    models = [tuned(make(), lora(init), lora(True)) for make in (remote, local)]
    plain = logits(local())
    for active in ("1", "0"):
        outputs = []
        for model in models:
            model.set_adapter(active)
            outputs.append(logits(model))
            with model.disable_adapter():
                outputs.append(logits(model))
        same(outputs[0], outputs[2])
        same(outputs[1], outputs[3])
        assert (outputs[0] - outputs[1]).abs().max() > 1e-2
        assert (outputs[1] - plain).abs().max() > 1e-2
    models[0].delete_adapter("0")
    models[1].delete_adapter("0")
    same(logits(models[0]), logits(models[1]))
    same(logits(models[0].unload()), logits(models[1].unload()))


def test_a_second_decomposition_is_of_what_the_first_left(remote: Make, local: Make) -> None:
    configs = lora("pissa"), lora("olora", r=3), lora("pissa_niter_2", r=2)
    mine, reference = tuned(remote(), *configs), tuned(local(), *configs)
    for active in ("0", "1", "2"):
        mine.set_adapter(active)
        reference.set_adapter(active)
        same(logits(mine), logits(reference))


def test_a_copy_has_residuals_too_and_alone(remote: Make, local: Make) -> None:
    reference, first = tuned(local(), lora("pissa")), tuned(remote(), lora("pissa"))
    second = copy.deepcopy(first)
    same(logits(second), logits(reference))
    second.add_adapter("1", lora("olora"))
    same(logits(first), logits(reference))
    assert all(isinstance(p, torch.nn.Parameter) for _, p in second.named_parameters())


def test_other_clients_see_nothing_of_it(remote: Make, local: Make) -> None:
    before = remote()
    tuned(before, lora("pissa"))
    logits(before)
    assert torch.equal(logits(remote()), logits(local()))


def test_generation(remote: Make, local: Make) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    outputs = [
        tuned(make(), lora("pissa")).generate(
            input_ids=ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        for make in (remote, local)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    same(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))


@pytest.mark.parametrize("options", [("--dtype", "bfloat16"), ("--quantize", "nf4"), ("--quantize", "int8")], ids=str)
@pytest.mark.parametrize("init", INITS[:2])
def test_peers_of_lower_precision(
    init: str, options: tuple[str, str], swarm: Swarm, models: Callable[[str], Path]
) -> None:
    """An adapter takes away what it begins with from the weights that the peers really have."""
    swarm.serve(models("llama"), "0:5", options=options)
    model = swarm.connect(models("llama"))
    before = logits(model)
    model = peft.get_peft_model(model, lora(init))
    scale = before.abs().max()
    assert (logits(model) - before).abs().max() < 0.02 * scale
    with model.disable_adapter():
        assert (logits(model) - before).abs().max() > 0.2 * scale


def test_conversion_to_plain_lora(remote: Make, local: Make, tmp_path: Path) -> None:
    """PEFT's own way to make of a PiSSA adapter one for unchanged weights."""
    model = peft.get_peft_model(remote(), lora("pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    same(logits(peft.PeftModel.from_pretrained(local(), tmp_path / "lora")), logits(model))


def _tune(model: Any, **options: Any) -> Any:
    return logits(peft.get_peft_model(model, lora(**options)))


def _dora_on_top(model: Any) -> Any:
    changed = peft.get_peft_model(model, lora("pissa"))
    changed.add_adapter("dora", lora(True, use_dora=True))


def _loaded_dora(model: Any) -> Any:
    dora = peft.get_peft_model(model, lora(True, use_dora=True))
    dora.add_adapter("pissa", lora("pissa"))
    logits(dora)


def _something_else_subtracted(model: Any) -> None:
    weight = model.model.layers._modules["1"].self_attn.q_proj.weight
    torch.linalg.qr(weight)[0][:, :2]
    weight.data -= torch.eye(32)


def _eva(model: Any) -> None:
    changed = peft.get_peft_model(model, lora("eva"))
    peft.initialize_lora_eva_weights(changed, [{"input_ids": torch.tensor([[5, 6, 7]])}], prepare_layer_inputs_fn=None)


def _lora_ga(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    config = lora("lora_ga", lora_ga_config=LoraGAConfig())
    peft.preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())


def _subtracted_unasked(model: Any) -> None:
    model.model.layers._modules["1"].self_attn.k_proj.weight.data.sub_(torch.ones(16, 32))


REFUSALS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "mica": (lambda m: _tune(m, init="mica"), RemoteWeightError, "only the leading ones"),
    "EVA": (_eva, BadUsage, "initialisation from activations"),
    "LoRA-GA": (_lora_ga, BadAdapter, "cannot be trained"),
    "CorDA": (lambda m: _tune(m, init="corda"), ValueError, "preprocess_corda"),  # which is made of hooks, as EVA
    "PiSSA with DoRA": (lambda m: _tune(m, init="pissa", use_dora=True), RemoteWeightError, "neither DoRA"),
    "DoRA on PiSSA": (_dora_on_top, RemoteWeightError, "neither DoRA"),
    "PiSSA on DoRA": (_loaded_dora, BadAdapter, "use one or the other"),
    "another difference": (_something_else_subtracted, RemoteWeightError, "no product of its leading factors"),
    "any difference": (_subtracted_unasked, RemoteWeightError, "only a product of its own"),
    "merging": (lambda m: tuned(m, lora("pissa")).merge_and_unload(), RemoteWeightError, "remote peers"),
}


@pytest.mark.parametrize(("attempt", "error", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refused(attempt: Callable[[Any], Any], error: type[Exception], said: str, remote: Make) -> None:
    model = remote()
    with pytest.raises(error, match=said) as caught:
        attempt(model)
    print(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_dense_is_kept(remote: Make) -> None:
    model = peft.get_peft_model(remote(), lora("pissa"))
    residuals = [p for p in model.parameters() if isinstance(p, GhostTensor) and p.subtracted is not None]
    assert len(residuals) == 10
    for ghost in residuals:
        assert ghost.subtracted.b.shape == (ghost.shape[0], 4)
        assert ghost.subtracted.a.shape == (4, ghost.shape[1])
    reader = residuals[0].source.reader.factors
    assert not reader._known
