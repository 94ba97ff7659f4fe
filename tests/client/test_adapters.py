"""Adapters through a swarm: as locally, and sent no oftener than they must be."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer

from client.training.micro_batches import TrainingCalls
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.tensors import nbytes
from tests.tools.swarm import Swarm

VOCABULARY = 128
TARGETS = ["q_proj", "v_proj", "down_proj"]
Connect = Callable[..., Any]


@pytest.fixture(scope="module")
def connect(llama_swarm: tuple[Path, Swarm]) -> Connect:
    """Makes a model through the swarm."""
    path, swarm = llama_swarm
    return lambda **options: swarm.connect(path, **options)


@pytest.fixture(scope="module")
def local(models: Callable[[str], Path]) -> Connect:
    """Makes the plain model."""
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(models("llama"))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(model: Any) -> torch.Tensor:
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels).loss  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**batch()).logits  # type: ignore[no-any-return]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_lora_weights": False}
        | options
    )


def adapted(model: Any, config: peft.PeftConfig) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(model, copy.deepcopy(config))


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- as locally

ON_CAUSAL: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
METHODS: dict[str, peft.PeftConfig] = {
    "dora": lora(use_dora=True, init_lora_weights=True),
    "lora_everywhere": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "lora_and_whole_modules": lora(modules_to_save=["lm_head"], trainable_token_indices=[5, 6, 7]),
    "boft": peft.BOFTConfig(boft_block_size=4, **ON_CAUSAL),
    "fourierft": peft.FourierFTConfig(n_frequency=50, **ON_CAUSAL),
    "hra": peft.HRAConfig(r=4, **ON_CAUSAL),
    "randlora": peft.RandLoraConfig(r=8, **ON_CAUSAL),
    "prefix": peft.PrefixTuningConfig(**VIRTUAL),
    "prompt": peft.PromptTuningConfig(**VIRTUAL),
}
"""Beside those of test_methods.py; here their initial values and generation are compared too."""


@pytest.mark.parametrize("method", METHODS)
def test_a_method_as_locally(method: str, connect: Connect, local: Connect) -> None:
    """Initial values, loss, every gradient, greedy tokens."""
    theirs, ours = (adapted(model, METHODS[method]) for model in (local(), connect()))
    expected, found = trained(theirs), trained(ours)
    assert expected
    assert found.keys() == expected.keys()
    for number, name in enumerate(expected):
        assert torch.equal(found[name], expected[name]), name
        torch.manual_seed(number)
        change = torch.randn_like(expected[name]) * 0.1  # initial values often make an adapter do nothing
        found[name].data.add_(change)
        expected[name].data.add_(change)
    losses = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(11)
        losses.append(loss_of(model))
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    for name, parameter in expected.items():
        mine = found[name].grad
        assert (mine is None) == (parameter.grad is None), name
        assert mine is None or torch.equal(mine, parameter.grad), name
    options = batch() | {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.eval().generate(**options), theirs.eval().generate(**options))


def test_adapters_switched_and_scaled(connect: Connect, local: Connect) -> None:
    """Two adapters: one, the other, none, both, half as strong, and the first again."""

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora())
        tuned.add_adapter("second", lora(r=2, use_rslora=True, target_modules=["k_proj", "v_proj"]))
        found = [logits(tuned)]
        tuned.set_adapter("second")
        found.append(logits(tuned))
        with tuned.disable_adapter():
            found.append(logits(tuned))
        tuned.base_model.set_adapter(["default", "second"])
        found.append(logits(tuned))
        with rescale_adapter_scale(tuned, 0.5):
            found.append(logits(tuned))
        tuned.set_adapter("default")
        return [*found, logits(tuned)]

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(ours[0], ours[5])
    assert torch.equal(ours[2], logits(local()))
    assert len({float(found.sum()) for found in ours}) == 5


@pytest.mark.parametrize("block", [0, 3])
def test_adapters_switched_on_some_layers(block: int, connect: Connect, local: Connect) -> None:
    """Two adapters; on the layers of one block another one, both, none."""

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora())
        tuned.add_adapter("second", lora(r=2, target_modules=["k_proj", "v_proj"]))
        switched = [m for m in model.model.layers[block].modules() if isinstance(m, BaseTunerLayer)]
        found = [logits(tuned)]
        for active in ("second", ["default", "second"], ["second", "default"]):
            for layer in switched:
                layer.set_adapter(active)
            found.append(logits(tuned))
        for layer in switched:
            layer.enable_adapters(False)
        return [*found, logits(tuned)]

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours, theirs))
    assert len({float(found.sum()) for found in ours}) >= 4


WAYS_TO_COMBINE = ["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd"]


def test_adapters_combined(connect: Connect, local: Connect) -> None:
    """`add_weighted_adapter`, one adapter with a head of its own. What `svd` makes is laid out by columns here, by rows
    on the peers, which rounds in another way.
    """

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora(modules_to_save=["lm_head"]))
        tuned.add_adapter("second", lora())
        found = []
        for way in WAYS_TO_COMBINE:
            density = 0.5 if way.startswith(("ties", "dare", "magnitude")) else None
            torch.manual_seed(3)
            tuned.add_weighted_adapter(["default", "second"], [0.7, 0.4], way, combination_type=way, density=density)
            tuned.set_adapter(way)
            found.append(logits(tuned))
        return found

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours[:-1], theirs[:-1]))
    torch.testing.assert_close(ours[-1], theirs[-1], atol=1e-5, rtol=0)
    assert len({float(found.sum()) for found in ours}) == len(WAYS_TO_COMBINE)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_dora": True, "init_lora_weights": True}], ids=str)
def test_an_adapter_loaded_without_first_values(
    options: dict[str, Any], connect: Connect, local: Connect, tmp_path: Path
) -> None:
    """`low_cpu_mem_usage`: until its file is read an adapter is on the meta device."""
    tuned = adapted(local(), lora(**options))
    with torch.no_grad():
        for parameter in trained(tuned).values():
            parameter.add_(0.02)
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(connect(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(tuned))
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(tuned))


def test_adapters_of_any_name(connect: Connect, local: Connect) -> None:
    def outputs(model: Any) -> list[torch.Tensor]:
        torch.manual_seed(7)
        names = ["my adapter", "org/adapter", "sft+dpo", "ä", "residual", "a0", "long" * 26]
        tuned = peft.get_peft_model(model, lora(), adapter_name=names[0])
        for name in names[1:]:
            tuned.add_adapter(name, lora())
        tuned.base_model.set_adapter(names)
        loss = loss_of(tuned)
        loss.backward()
        return [loss, *(p.grad for p in trained(tuned).values())]

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours, theirs))


def test_an_adapter_deleted_and_made_anew(connect: Connect, local: Connect) -> None:
    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora())
        found = [logits(tuned)]
        tuned.delete_adapter("default")
        torch.manual_seed(8)
        tuned.add_adapter("default", lora(r=3))
        tuned.set_adapter("default")
        return [*found, logits(tuned), logits(tuned.unload())]

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours, theirs))


def test_weights_replaced_behind_autograds_back(connect: Connect, local: Connect) -> None:
    """`.data` does not count up a parameter's version; what is sent is what is there."""

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora())
        found = [logits(tuned)]
        for number, parameter in enumerate(trained(tuned).values()):
            parameter.data = parameter.data * (1 + number % 3)
        found.append(logits(tuned))
        for parameter in trained(tuned).values():
            parameter.data.mul_(0.5)
        return [*found, logits(tuned)]

    theirs, ours = outputs(local()), outputs(connect())
    assert all(map(torch.equal, ours, theirs))


def test_a_cached_prompt_is_gone_on_with_after_training(connect: Connect, local: Connect) -> None:
    """Fused optimizers do not count up versions either; the prompt's cache, and copies of it, outlive their steps."""

    def outputs(model: Any) -> list[torch.Tensor]:
        tuned = adapted(model, lora()).eval()
        optimizer = torch.optim.AdamW(trained(tuned).values(), lr=0.1, fused=True)
        ids, cache, found = batch()["input_ids"], transformers.DynamicCache(config=model.config), []
        with torch.no_grad(), tuned.disable_adapter():
            tuned(ids, past_key_values=cache)
        for _ in range(2):
            with torch.no_grad():
                found += [tuned(ids[:, :4], past_key_values=used).logits for used in (copy.deepcopy(cache), cache)]
            cache.crop(-4)
            loss_of(tuned).backward()
            optimizer.step()
            optimizer.zero_grad()
        return found

    theirs, ours = outputs(local()), outputs(connect())
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.equal(ours[0], ours[2])


def test_no_gradient_of_a_gradient(connect: Connect) -> None:
    """A penalty on gradients would train with the blocks' part of it left out."""
    tuned = adapted(connect(), lora()).train()
    embedded = tuned.get_input_embeddings()(batch()["input_ids"]).requires_grad_(True)
    loss = tuned(inputs_embeds=embedded, labels=batch()["input_ids"]).loss
    (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (loss + gradient.pow(2).sum()).backward()


# ---- what travels


class Traffic:
    """What this process sends to peers."""

    def __init__(self) -> None:
        self.puts: list[tuple[str, int]] = []
        """Peer and bytes of each adapter sent."""
        self.calls = 0
        """Forwards and backwards."""

    def take(self) -> list[tuple[str, int]]:
        """The adapters sent since the last question."""
        puts, self.puts = self.puts, []
        return puts


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    traffic, send = Traffic(), Channel.send

    async def note(self: Channel, message: Message) -> None:
        if isinstance(message.body, pb.PutAdapter):
            traffic.puts.append((self.remote, nbytes(message.tensors)))
        traffic.calls += isinstance(message.body, pb.Forward | pb.Backward)
        await send(self, message)

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "send", note)
        yield traffic


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapter_travels_once_per_optimizer_step(
    fused: bool, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once per micro-batch, and not again for a backward, an evaluation or a generation."""
    model = connect(micro_batch_tokens=12)  # a row
    tuned = adapted(model, lora(lora_alpha=10 + fused, lora_dropout=0.1)).train()
    optimizer = torch.optim.AdamW(trained(tuned).values(), lr=1e-2, fused=fused)
    size = sum(parameter.numel() * 4 for parameter in trained(tuned).values())
    with watched(monkeypatch) as traffic:
        for _ in range(3):
            for _ in range(2):  # gradient accumulation
                loss_of(tuned).backward()
            puts = traffic.take()
            assert len({peer for peer, _ in puts}) == len(puts) == 3  # spans
            assert sum(count for _, count in puts) == size
            logits(tuned)
            tuned.generate(**batch(), max_new_tokens=3)
            assert not traffic.take()
            tuned.train()
            optimizer.step()
            optimizer.zero_grad()
        assert traffic.calls >= 3 * 2 * 4 * 3 * 2  # steps, accumulated, rows, spans, forward and backward


def test_modules_left_out_in_one_micro_batch_learn_from_the_others(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = list[frozenset[str]]()

    async def note(*arguments: Any) -> Any:
        hidden, gradients = await backward(*arguments)
        answered.append(frozenset(gradients))
        return hidden, gradients

    backward = TrainingCalls._backward
    monkeypatch.setattr(TrainingCalls, "_backward", note)
    config = peft.LoKrConfig(r=4, alpha=4, target_modules=TARGETS, module_dropout=0.5)
    tuned = adapted(connect(micro_batch_tokens=12), config).train()
    loss_of(tuned).backward()
    assert len(set(answered)) > 1
    assert sum(p.grad is not None for p in trained(tuned).values()) == len(frozenset().union(*answered))


def test_an_adapter_goes_where_its_blocks_are(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching off and on, and going back to earlier values, sends nothing again."""
    tuned = adapted(connect(), lora(layers_to_transform=[2], lora_alpha=13))
    weight = next(iter(trained(tuned).values()))
    before = weight.detach().clone()
    with watched(monkeypatch) as traffic:
        first = logits(tuned)
        assert len(traffic.take()) == 1
        with tuned.disable_adapter():
            logits(tuned)
        assert torch.equal(logits(tuned), first)
        assert not traffic.take()
        weight.data.mul_(2)
        assert not torch.equal(logits(tuned), first)
        assert len(traffic.take()) == 1
        weight.data.copy_(before)
        assert torch.equal(logits(tuned), first)
        assert not traffic.take()


def test_a_loss_without_the_adapter_in_the_middle_of_training(connect: Connect, local: Connect) -> None:
    """The reference of a preference loss, by those who do not care that it has no gradient."""
    losses = []
    for model in (connect(), local()):
        tuned = adapted(model, lora()).train()
        with tuned.disable_adapter():
            reference = loss_of(tuned)
        assert not reference.requires_grad
        loss = loss_of(tuned) - reference
        loss.backward()
        losses += [reference, loss.detach()]
    assert losses[:2] == losses[2:]


def test_training_that_trains_nothing_is_said_where_it_cannot_be_refused(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Of logits alone nobody knows that they are trained with; torch's own error does not say why they cannot be."""
    model = connect().train()
    for _ in range(2):
        model(**batch())
    assert [record.getMessage() for record in caplog.records] == [
        "Nothing of this model is being trained: its blocks live on remote peers, so full fine-tuning is not possible; "
        "use a PEFT adapter (loaded with is_trainable=True), or set requires_grad for weights that this machine holds, "
        "such as lm_head.weight."
    ]
    caplog.clear()
    logits(connect())
    tuned = adapted(connect(), lora()).train()
    tuned(**batch())
    with tuned.disable_adapter():
        tuned(**batch())
    assert not caplog.records
