"""A swarm model without PEFT: what this machine holds is trained, saved and loaded again; the blocks never are."""

import copy
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from client import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from client.ghosts.tensor import GhostTensor
from peer.span.loading import load_span
from protocol.errors import BadAdapter, BadUsage, UnsupportedModel
from protocol.model.checkpoint import open_checkpoint
from tests.tools.methods import TASKS, load, logits, train, trainable
from tests.tools.swarm import ForkServer, Swarm, new_swarm

IDS = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


@dataclass(frozen=True)
class Family:
    """A small model and the peers that serve it."""

    name: str
    path: Path
    swarm: Swarm

    def remote(self, path: Path | None = None, **options: Any) -> Any:
        return AutoDistributedModelForCausalLM.from_pretrained(
            str(path or self.path), initial_peers=self.swarm.initial_peers, **options
        )

    def local(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.path).eval()


@pytest.fixture(scope="module", params=["bloom", "gpt2", "gemma2", "mixtral"])
def family(request: pytest.FixtureRequest, fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[Family]:
    with new_swarm(fork_server) as swarm:
        swarm.serve(models(request.param), "0:5")
        yield Family(request.param, models(request.param), swarm)


@pytest.fixture(scope="module")
def llama(llama_swarm: tuple[Path, Swarm]) -> Family:
    return Family("llama", *llama_swarm)


def only_embeddings(model: Any) -> Any:
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def held(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not isinstance(p.data, GhostTensor)}


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(mine, reference)


def test_embeddings_are_trained_saved_and_loaded(family: Family, tmp_path: Path) -> None:
    """Three steps in training mode; the folder loads in a swarm, and over the base model in plain Transformers."""
    ours, theirs = only_embeddings(family.remote()), only_embeddings(family.local())
    assert_equal(train(ours, "CAUSAL_LM", "embeddings"), train(theirs, "CAUSAL_LM", "embeddings"))
    ours.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    written = load_file(tmp_path / "model.safetensors")
    tied = ours.config.tie_word_embeddings
    assert len(written) == len(held(ours))
    assert ("lm_head.weight" in written) != tied
    again = family.remote(tmp_path)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert torch.equal(logits(again, "CAUSAL_LM"), logits(theirs, "CAUSAL_LM"))
    plain = family.local()
    assert not plain.load_state_dict(written, strict=False).unexpected_keys
    assert torch.equal(logits(plain, "CAUSAL_LM"), logits(theirs, "CAUSAL_LM"))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_head_is_trained_saved_and_loaded(task: str, llama: Family, tmp_path: Path) -> None:
    ours, theirs = load(llama.path, task, llama.swarm.initial_peers), load(llama.path, task, None)
    theirs.requires_grad_(False)
    for model in ours, theirs:
        model.score.requires_grad_(True)
    assert_equal(train(ours, task, "head"), train(theirs, task, "head"))
    ours.save_pretrained(tmp_path / "once")
    again = TASKS[task][1].from_pretrained(str(tmp_path / "once"), initial_peers=llama.swarm.initial_peers)
    assert again.num_labels == 3
    assert torch.equal(logits(again, task), logits(theirs, task))
    again.save_pretrained(tmp_path / "twice")  # not a chain: it is of the same base
    shutil.rmtree(tmp_path / "once")
    again = TASKS[task][1].from_pretrained(str(tmp_path / "twice"), initial_peers=llama.swarm.initial_peers)
    assert torch.equal(logits(again, task), logits(theirs, task))


def run_trainer(model: Any, folder: Path, resume: Path | None = None) -> Trainer:
    tokens = torch.randint(3, 128, (24, 8), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    options: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True,
        "metric_for_best_model": "eval_loss", "report_to": [], "seed": 1, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows, eval_dataset=rows[:4])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def figures(trainer: Trainer) -> list[tuple[float, ...]]:
    keys = "loss", "grad_norm", "eval_loss"
    return [tuple(entry[key] for key in keys if key in entry) for entry in trainer.state.log_history]


def test_trainer_checkpoints(llama: Family, tmp_path: Path) -> None:
    """Saved, resumed and the best one loaded; "best" is the highest loss here, so it is not the last one."""
    theirs = run_trainer(only_embeddings(llama.local()), tmp_path / "local")
    ours = run_trainer(only_embeddings(llama.remote()), tmp_path / "remote")
    assert figures(ours) == figures(theirs)
    assert len(figures(ours)) == 10
    best = tmp_path / "remote" / "checkpoint-2"
    assert ours.state.best_model_checkpoint == str(best)
    for name, parameter in held(ours.model).items():
        assert torch.equal(parameter, theirs.model.get_parameter(name)), name
    assert torch.equal(logits(llama.remote(best), "CAUSAL_LM"), logits(theirs.model, "CAUSAL_LM"))
    resumed = run_trainer(only_embeddings(llama.remote()), tmp_path / "resumed", tmp_path / "remote" / "checkpoint-4")
    assert figures(resumed)[-3:] == figures(theirs)[-3:]
    assert len(list(tmp_path.glob("remote/*/model.safetensors"))) == 3


def test_state_dicts_know_no_ghosts(llama: Family) -> None:
    model = llama.remote()
    state = model.state_dict()
    assert list(state) == list(held(model)) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert model.load_state_dict({name: tensor * 2 for name, tensor in state.items()}).missing_keys == []
    assert torch.equal(model.lm_head.weight, llama.local().lm_head.weight * 2)
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head.weight\"\. $"):
        model.load_state_dict({name: tensor for name, tensor in state.items() if "lm_head" not in name})
    with pytest.raises(BadUsage, match=r"model.layers.0.*remote peers"):
        model.load_state_dict(llama.local().state_dict())


def test_state_dicts_of_adapters(llama: Family) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ours, other = (peft.get_peft_model(llama.remote(), config) for _ in range(2))
    state = ours.state_dict()
    assert len(state) == 3 + 2 * 5
    assert not torch.equal(logits(ours, "CAUSAL_LM"), logits(other, "CAUSAL_LM"))
    other.load_state_dict(state)
    assert torch.equal(logits(ours, "CAUSAL_LM"), logits(other, "CAUSAL_LM"))


def test_sizes(llama: Family) -> None:
    ours, theirs = llama.remote(), llama.local()
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(only_trainable=True) == 0
    assert only_embeddings(ours).num_parameters(only_trainable=True) == 128 * 32
    on_this_machine = [*held(ours).values(), *ours.model.rotary_emb.buffers()]
    assert ours.get_memory_footprint() == sum(tensor.nbytes for tensor in on_this_machine)


def test_a_copy_of_a_model(llama: Family) -> None:
    """It goes its own way through the same swarm."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(llama.remote(), config)
    before = logits(tuned, "CAUSAL_LM")
    twin = copy.deepcopy(tuned)
    assert torch.equal(logits(twin, "CAUSAL_LM"), before)
    assert {name for name, _ in twin.named_parameters()} == {name for name, _ in tuned.named_parameters()}
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in twin.parameters())
    twin(**BATCH).loss.backward()
    assert all(parameter.grad is not None for _, parameter in trainable(twin))
    assert all(parameter.grad is None for parameter in tuned.parameters())
    with torch.no_grad():
        for _, parameter in trainable(twin):
            parameter.zero_()
    hidden = torch.randn(1, 4, 32)
    assert torch.equal(twin.swarm.blocks(hidden), llama.remote().swarm.blocks(hidden))
    assert torch.equal(logits(twin, "CAUSAL_LM"), logits(llama.local(), "CAUSAL_LM"))
    assert torch.equal(logits(tuned, "CAUSAL_LM"), before)


def test_another_dtype(fork_server: ForkServer, models: Callable[[str], Path], tmp_path: Path) -> None:
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:5", options=["--dtype", "bfloat16"])
        family = Family("llama", models("llama"), swarm)
        ours = family.remote().to(torch.bfloat16)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(family.path, dtype=torch.bfloat16).eval()
        expected = logits(theirs, "CAUSAL_LM")
        assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(ours, "CAUSAL_LM"), expected)
        ours.save_pretrained(tmp_path)
        again = family.remote(tmp_path)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(tensor, held(ours)[name]) for name, tensor in held(again).items())


def test_more_tokens(llama: Family, tmp_path: Path) -> None:
    ours, theirs = llama.remote(), llama.local()
    for model in ours, theirs:
        torch.manual_seed(0)
        model.resize_token_embeddings(131)
    ids = torch.tensor([[5, 130, 7, 128]])
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(ours(ids).logits, expected)
        ours.save_pretrained(tmp_path)
        again = llama.remote(tmp_path)
        assert torch.equal(again(ids).logits, expected)
    assert again.config.vocab_size == 131


def test_prepared_for_quantized_training(llama: Family) -> None:
    """`prepare_model_for_kbit_training` makes 32 bits of the 16 that this machine holds; ghosts come along."""
    ours = peft.prepare_model_for_kbit_training(llama.remote(dtype=torch.bfloat16))
    theirs = llama.local()
    with torch.no_grad():
        for name in held(ours):
            parameter = theirs.get_parameter(name)
            parameter.copy_(parameter.bfloat16())
    results = []
    for model in ours, peft.prepare_model_for_kbit_training(theirs):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
        results.append(train(tuned, "CAUSAL_LM", "LoRA"))
    assert_equal(*results)


def test_inference_mode(llama: Family) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    seen = []
    for model in llama.remote(), llama.local():
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config).eval()
        with torch.inference_mode():
            output = tuned(**BATCH)
            tokens = tuned.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
        tuned(**BATCH).loss.backward()  # and nothing of it is in the way of training
        seen.append([output.loss, output.logits, tokens, *(p.grad for _, p in trainable(tuned))])
    assert_equal(*seen)


def test_the_checkpoints_generation_config(llama: Family, tmp_path: Path) -> None:
    shutil.copytree(llama.path, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.5, "eos_token_id": [2, 7], "max_new_tokens": 4}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    ours = llama.remote(tmp_path / "model")
    assert ours.generation_config.to_diff_dict().items() >= settings.items()
    torch.manual_seed(0)
    tokens = ours.generate(IDS)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tokens, plain.generate(IDS))


class TestRefusals:
    """One sentence each."""

    def test_full_fine_tuning(self, llama: Family, tmp_path: Path) -> None:
        with pytest.raises(BadUsage, match=r"full fine-tuning is not possible.* such as lm_head\.weight\.$"):
            run_trainer(llama.remote(), tmp_path)
        model = AutoDistributedModelForSequenceClassification.from_pretrained(
            str(llama.path), initial_peers=llama.swarm.initial_peers, num_labels=3
        )
        with pytest.raises(BadUsage, match=r"such as score\.weight\.$"):
            model.train()(IDS, labels=torch.tensor([0, 2, 1]))

    def test_requires_grad_on_everything(self, llama: Family, tmp_path: Path) -> None:
        for call in lambda m: m(IDS), lambda m: m.swarm.blocks(torch.zeros(1, 2, 32)), lambda m: m.generate(IDS):
            with pytest.raises(BadAdapter, match=r"weight of the remote blocks and cannot be trained"):
                call(llama.remote().requires_grad_(True))
        with pytest.raises(BadAdapter, match=r"cannot be trained"):
            run_trainer(llama.remote().requires_grad_(True), tmp_path)

    def test_pickling(self, llama: Family) -> None:
        model = llama.remote()
        lora = peft.LoraConfig(target_modules=["q_proj"])
        for what in model, peft.get_peft_model(llama.remote(), lora):
            with pytest.raises(BadUsage, match=r"cannot be pickled, .*; use save_pretrained\.$"):
                torch.save(what, io.BytesIO())
        with pytest.raises(BadUsage, match="A cache that peers hold cannot be pickled"):
            pickle.dumps(model(IDS).past_key_values)

    def test_a_folder_whose_base_is_gone(self, llama: Family, tmp_path: Path) -> None:
        shutil.copytree(llama.path, tmp_path / "base")
        llama.remote(tmp_path / "base").save_pretrained(tmp_path / "saved")
        config = tmp_path / "saved" / "config.json"
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(UnsupportedModel, match=r"base model of .*put its new place into swarm_base"):
            llama.remote(tmp_path / "saved")
        saved = json.loads(config.read_text())
        saved["swarm_base"]["name"] = str(tmp_path / "moved")
        config.write_text(json.dumps(saved))
        assert torch.equal(logits(llama.remote(tmp_path / "saved"), "CAUSAL_LM"), logits(llama.local(), "CAUSAL_LM"))
        saved["swarm_base"]["config_hash"] = "0" * 32
        config.write_text(json.dumps(saved))
        with pytest.raises(UnsupportedModel, match="is another model than"):
            llama.remote(tmp_path / "saved")

    @pytest.mark.parametrize("entry", [None, 3, {}, {"name": 3}, {"name": "there", "revision": []}])
    def test_a_folder_that_names_no_base(self, entry: Any, llama: Family, tmp_path: Path) -> None:
        shutil.copytree(llama.path, tmp_path / "model")
        config = tmp_path / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"swarm_base": entry}))
        with pytest.raises(UnsupportedModel, match="names no model"):
            llama.remote(tmp_path / "model")

    def test_a_folder_of_an_adapter(self, llama: Family, tmp_path: Path) -> None:
        peft.get_peft_model(llama.remote(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match=r"a PEFT adapter, .*by PeftModel\.from_pretrained or --adapter\.$"):
            llama.remote(tmp_path)

    def test_a_folder_without_the_needed_head(self, llama: Family, tmp_path: Path) -> None:
        load(llama.path, "SEQ_CLS", llama.swarm.initial_peers).save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match=r"lacks weights that \w+ needs, such as lm_head\.weight"):
            llama.remote(tmp_path)

    def test_a_folder_without_blocks_is_not_served(self, llama: Family, tmp_path: Path) -> None:
        llama.remote().save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match="lacks weights of blocks 0:2"):
            load_span(open_checkpoint(str(tmp_path)), 0, 2)
