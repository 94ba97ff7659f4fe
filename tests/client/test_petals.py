"""Petals' documented interface, as its README, wiki and notebooks use it: docs/compatibility.md has the table."""

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import client
from client.ghosts.questions import RemoteWeightError
from protocol.errors import BadUsage
from tests.tools.arena import batch, one
from tests.tools.methods import batch_for, load
from tests.tools.swarm import Both

NEW = 6
IDS = one()["input_ids"]
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(llamas: Both) -> Any:
    return llamas.remote()


@pytest.fixture(scope="module")
def local(llamas: Both) -> Any:
    return llamas.local().requires_grad_(False)  # as the swarm's: torch multiplies by a trainable matrix in another way


def test_the_names_of_classes() -> None:
    for name in ("AutoDistributedModelForCausalLM", "AutoDistributedModelForSequenceClassification"):
        assert getattr(client, name).from_pretrained
    assert client.DistributedLlamaForCausalLM.from_pretrained
    assert client.DistributedBloomForSequenceClassification.from_pretrained
    for name in ("AutoDistributedConfig", "RemoteSequential", "AutoDistributedSpeculativeModel"):
        with pytest.raises(AttributeError, match=name):
            getattr(client, name)


@pytest.mark.parametrize("options", [GREEDY, GREEDY | {"do_sample": True, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("rows", [1, 2])
def test_generating_in_several_calls(options: dict[str, Any], rows: int, model: Any, local: Any) -> None:
    """With a session that is named and one that is in use."""
    prompts = batch()["input_ids"][:rows]
    torch.manual_seed(0)
    expected = local.generate(prompts, max_new_tokens=NEW, **options)
    torch.manual_seed(0)
    with model.inference_session(max_length=prompts.shape[1] + NEW) as session:
        assert model.transformer.h.active_session is session
        parts = [
            model.generate(prompts, max_new_tokens=1, session=session, **options),
            model.generate(None, max_new_tokens=NEW - 2, **options),
            model.generate(max_new_tokens=1, **options),
        ]
        assert session.position == prompts.shape[1] + NEW - 1
        assert torch.equal(session.output_ids, expected)
    assert torch.equal(torch.cat(parts, 1), expected)
    assert model.transformer.h.active_session is None


def test_a_chat(model: Any, local: Any) -> None:
    """As the chat bot of the tutorial: a prompt, token by token; then another prompt. Outside of the block, too."""
    answer = model.generate
    with model.inference_session(max_length=512) as session:
        said, expected = IDS[:, :0], IDS[:, :0]
        for prompt in (IDS, IDS[:, :3]):
            expected = local.generate(torch.cat([expected, prompt], 1), max_new_tokens=3, **GREEDY)
            prefix: Any = prompt
            for _ in range(3):
                said = torch.cat([said, answer(prefix, max_new_tokens=1, session=session, **GREEDY)], 1)
                prefix = None
            assert torch.equal(said, expected)


def test_a_session_put_aside(model: Any, local: Any) -> None:
    expected = local.generate(IDS, max_new_tokens=4, **GREEDY)
    with model.inference_session(max_length=64) as session:
        model.generate(IDS, max_new_tokens=2, **GREEDY)
        with model.use_session(None):
            assert torch.equal(model.generate(IDS, max_new_tokens=4, **GREEDY), expected)
        with model.use_session(session):
            assert torch.equal(model.generate(max_new_tokens=2, **GREEDY), expected[:, -2:])


def test_masks_and_outputs_in_a_session(model: Any, local: Any) -> None:
    prompts = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    expected = local.generate(**prompts, max_new_tokens=4, **options)
    with model.inference_session(max_length=64):
        first = model.generate(**prompts, max_new_tokens=2, **options)
        second = model.generate(max_new_tokens=2, **options)
    assert torch.equal(torch.cat([first.sequences, second.sequences], 1), expected.sequences)
    assert torch.equal(torch.stack([*first.logits, *second.logits]), torch.stack(expected.logits))


def test_generating_with_an_adapter_in_a_session(llamas: Both) -> None:
    def tuned(model: Any) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"])).eval()

    expected = tuned(llamas.local()).generate(IDS, max_new_tokens=NEW, **GREEDY)
    ours = tuned(llamas.remote())
    with ours.inference_session(max_length=64) as session:
        parts = [ours.generate(IDS, max_new_tokens=2, session=session, **GREEDY)]
        parts.append(ours.generate(None, max_new_tokens=NEW - 2, session=session, **GREEDY))
    assert torch.equal(torch.cat(parts, 1), expected)


def test_hidden_states_step_by_step(model: Any, local: Any) -> None:
    """The blocks by Petals' name, in a session of theirs; then back to an earlier position."""
    with torch.no_grad():
        expected = local(IDS).logits
        embedded = model.get_input_embeddings()(IDS)
        with model.transformer.h.inference_session(max_length=IDS.shape[1]) as session:
            outputs = [session.step(embedded[:, :0])]
            outputs += [session.step(part) for part in embedded.split([1, 1, 4, 5], 1)]
            assert session.position == IDS.shape[1]
            session.position = 4
            again = model.transformer.h(embedded[:, 4:])
        steps = torch.cat(outputs, 1)
        torch.testing.assert_close(model.lm_head(model.model.norm(steps)), expected)
        torch.testing.assert_close(again, steps[:, 4:])


def test_a_path_of_ones_own(model: Any, local: Any) -> None:
    """The classifier of the tutorial: an adapter between two halves of the blocks, which is trained."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.distributed_layers = model.transformer.h
            self.adapter = nn.Linear(32, 32)
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)

        def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
            middle = len(self.distributed_layers) // 2
            first, second = self.distributed_layers[:middle], self.distributed_layers[middle:]
            assert (len(first), len(second), len(second[1:])) == (2, 3, 2)
            return second(self.adapter(first(embeddings)))  # type: ignore[no-any-return]

    classifier = Classifier()
    hidden = classifier(model.get_input_embeddings()(IDS))
    logits = model.lm_head(model.model.norm(hidden))
    with torch.no_grad():
        torch.testing.assert_close(logits, local(IDS).logits)
    logits.logsumexp(-1).sum().backward()
    assert classifier.adapter.weight.grad.abs().sum() > 0
    torch.optim.AdamW(classifier.parameters()).step()


def test_one_block(model: Any, local: Any) -> None:
    embedded = model.get_input_embeddings()(IDS)
    positions = local.model.rotary_emb(embedded, position_ids=torch.arange(IDS.shape[1])[None])
    expected = local.model.layers[3](embedded, position_embeddings=positions)
    torch.testing.assert_close(model.transformer.h[3:4](embedded), expected)
    with pytest.raises(RemoteWeightError, match="lives on remote peers"):
        model.transformer.h[3](embedded, position_embeddings=positions)


MODES: dict[str, Any] = {"ptune": peft.PromptTuningConfig, "deep_ptune": peft.PrefixTuningConfig}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_prompts_that_are_trained(mode: str, task: str, llamas: Both) -> None:
    """The notebooks' prompt tuning and their sequence classification, which are PEFT's here."""
    options: dict[str, Any] = {"num_labels": 3} if task == "SEQ_CLS" else {}
    cls = {
        "CAUSAL_LM": client.AutoDistributedModelForCausalLM,
        "SEQ_CLS": client.DistributedLlamaForSequenceClassification,
    }[task]
    ours = cls.from_pretrained(
        str(llamas.path), initial_peers=llamas.swarm.initial_peers, tuning_mode=mode, pre_seq_len=3, **options
    )
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained} <= {"embedding", "default"}
    theirs = peft.get_peft_model(load(llamas.path, task, None), MODES[mode](num_virtual_tokens=3, task_type=task))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for tuned in (ours, theirs):
        tuned.train()
        tuned(**batch_for(task)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trained.keys()
    assert all(torch.equal(trained[name].grad, gradients[name]) for name in trained)


@pytest.mark.parametrize("mode", MODES)
def test_talking_to_a_model_with_trained_prompts(mode: str, llamas: Both) -> None:
    ours = llamas.swarm.connect(llamas.path, tuning_mode=mode, pre_seq_len=3).eval()
    expected = ours.generate(input_ids=IDS, max_new_tokens=4, **GREEDY)
    more = ours.generate(input_ids=torch.cat([expected, IDS], 1), max_new_tokens=2, **GREEDY)
    with ours.inference_session(max_length=512) as session:
        parts = [ours.generate(prompt, max_new_tokens=2, session=session, **GREEDY) for prompt in (IDS, None, IDS)]
    assert torch.equal(torch.cat(parts, 1), more)


def test_a_copy_has_sessions_of_its_own(model: Any) -> None:
    twin = copy.deepcopy(model)
    with twin.inference_session(max_length=64) as session:
        assert model.transformer.h.active_session is None
        with pytest.raises(BadUsage, match="This session is of another model"):
            model.generate(IDS, max_new_tokens=1, session=session)


def test_options_by_petals_names(llamas: Both) -> None:
    peers = [peer.peer_id for peer in llamas.swarm.peers]
    model = llamas.swarm.connect(llamas.path, allowed_servers=peers, blocked_servers=[], use_auth_token=False)
    assert model.swarm.config.allowed_peers == frozenset(peers)
    with pytest.raises(BadUsage, match="allowed_servers is another name of allowed_peers"):
        llamas.swarm.connect(llamas.path, allowed_servers=peers, allowed_peers=peers)
    with pytest.raises(BadUsage, match=r"use PeftModel\.from_pretrained"):
        llamas.swarm.connect(llamas.path, active_adapter="me/lora")


@pytest.fixture
def session(model: Any) -> Iterator[Any]:
    with model.inference_session(max_length=64) as session:
        yield session


def test_what_a_session_cannot_do(model: Any, session: Any) -> None:
    with pytest.raises(BadUsage, match="Within inference_session the model goes on from the session"):
        model(IDS)
    with pytest.raises(BadUsage, match="A session begins with a prompt"):
        model.generate(max_new_tokens=1)
    with pytest.raises(BadUsage, match="cannot go to position 3"):
        session.position = 3
    model.generate(IDS, max_new_tokens=1, num_beams=2, eos_token_id=None)
    with pytest.raises(BadUsage, match="does not go on from beam search"):
        model.generate(max_new_tokens=1)


@pytest.mark.parametrize("options", [{"tuning_mode": "lora", "pre_seq_len": 3}, {"tuning_mode": "ptune"}])
def test_a_tuning_mode_that_is_none(options: dict[str, Any], llamas: Both) -> None:
    with pytest.raises(BadUsage, match="tuning_mode is ptune or deep_ptune, and pre_seq_len the number of virtual"):
        llamas.swarm.connect(llamas.path, **options)
