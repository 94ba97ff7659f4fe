"""A whole run: the same losses as a plain `Trainer`, what it writes, and what it says before it begins."""

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, Trainer, TrainingArguments, set_seed

from client.commands.tune import run_tune
from client.tokenizer import vocabulary_size
from client.tune.description.config import TuneConfig
from client.tune.errors import ConfigError, DataError, Interrupted
from client.tune.running.dataset import Collator, prepare
from client.tune.running.plan import count_steps
from client.tune.running.run import TuneResult, TuneRun, check_output
from client.tune.running.samples import Sample, samples_markdown
from protocol.model.anatomy import context_length
from tests.tools.command import Command
from tests.tools.tune import ALPACA, byte_tokenizer, describe, losses, silent, start, tiny_llama, write_jsonl

Whole = tuple[TuneConfig, TuneRun, TuneResult, str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A finished run with everything on, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "validation.jsonl", ALPACA[:4])
    config = describe(
        folder,
        data={"validation": str(folder / "validation.jsonl")},
        trainer={"log_every": 3, "eval_every": 4, "tensorboard": importlib.util.find_spec("tensorboard") is not None},
        samples={"prompts": ["Say yak"]},
    )
    run = start(config)
    screen = io.StringIO()
    return config, run, run.train(Console(file=screen, width=200)), screen.getvalue()


def test_the_losses_are_those_of_a_plain_trainer(tmp_path: Path) -> None:
    config = describe(tmp_path)
    start(config).train(silent())

    rows = prepare(config, byte_tokenizer(), 256).train
    model = tiny_llama()
    set_seed(42)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    plain = Trainer(get_peft_model(model, lora), arguments, train_dataset=rows, data_collator=Collator(False, 257))
    plain.train()
    expected = {entry["step"]: entry["loss"] for entry in plain.state.log_history if "loss" in entry}
    assert losses(config) == expected


def test_the_log_has_a_mean_of_every_three_steps_and_the_last(whole: Whole, tmp_path: Path) -> None:
    config = whole[0]
    every = describe(tmp_path)
    start(every).train(silent())
    single = losses(every)
    expected = {3: (1, 2, 3), 6: (4, 5, 6), 8: (7, 8)}
    assert losses(config) == {end: sum(map(single.get, steps)) / len(steps) for end, steps in expected.items()}  # type: ignore[arg-type]


def test_a_line_of_the_log(whole: Whole) -> None:
    lines = [json.loads(line) for line in (whole[0].output / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [
        (0, False), (3, True), (4, False), (6, True), (8, True), (8, False)
    ]  # fmt: skip
    assert set(lines[1]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"
    }  # fmt: skip
    assert set(lines[0]) == {"step", "eval_loss", "perplexity", "seconds"}
    assert lines[0]["perplexity"] == pytest.approx(torch.tensor(lines[0]["eval_loss"]).exp().item())
    plan = whole[1].plan()
    assert lines[1]["tokens"] == plan.tokens  # three steps are one pass
    assert lines[1]["tokens_per_second"] == pytest.approx(plan.tokens / lines[1]["seconds"], rel=0.05)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_the_result(whole: Whole) -> None:
    config, _, result, _ = whole
    lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    assert result == TuneResult(
        adapter=config.output / "adapter",
        steps=8,
        loss_before=(lines[1]["loss"] + lines[3]["loss"]) / 2,
        loss_after=(lines[3]["loss"] + lines[-2]["loss"]) / 2,
        validation_before=lines[0]["eval_loss"],
        validation_after=lines[-1]["eval_loss"],
        seconds=lines[-1]["seconds"],
    )
    assert result.validation_after is not None
    assert result.validation_before is not None
    assert result.validation_after < result.validation_before


def test_the_adapter_loads_in_plain_peft_and_is_the_trained_one(whole: Whole) -> None:
    config, run, *_ = whole
    loaded = PeftModel.from_pretrained(tiny_llama(), config.output / "adapter").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        trained = run.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        assert not torch.equal(tiny_llama().eval()(input_ids=ids).logits, trained)


def test_the_files_of_a_run(whole: Whole) -> None:
    output = whole[0].output
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert not list(output.rglob("*.part"))
    assert not list(output.rglob("training_args.bin"))
    allowed = {"run.json", "log.jsonl", "loss.png", "samples.md", "adapter", "checkpoints", "tensorboard"}
    assert {path.name for path in output.iterdir()} <= allowed


def test_tensorboard_gets_every_step(whole: Whole) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(whole[0].output / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 4, 8]


def test_samples_show_the_model_before_and_after(whole: Whole) -> None:
    config, run, *_ = whole
    text = (config.output / "samples.md").read_text()
    assert text.startswith("# Samples of tiny before and after 8 steps\n")
    assert "~~~~text\nuser\nSay yak\nassistant\n~~~~" in text
    ids = byte_tokenizer()(
        "<|im_start|>user\nSay yak<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
    ).input_ids
    made = tiny_llama().generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    before = byte_tokenizer().decode(made, skip_special_tokens=True).strip()
    assert f"**Before**\n\n~~~~text\n{before}\n~~~~" in text
    assert run.model.config.use_cache is True  # Trainer switches it off for training


def test_samples_of_the_page() -> None:
    page = samples_markdown("m", 2, [Sample("p", "b", "a\n")])
    assert page.count("~~~~text\na\n~~~~") == 1
    assert page.index("**Prompt**") < page.index("**Before**") < page.index("**After**")


def test_samples_are_made_whatever_the_checkpoint_asks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.tune.running.run.plot_losses", lambda lines: b"drawn")
    run = start(describe(tmp_path, trainer={"steps": 1, "gradient_accumulation": 1}))
    asked = run.model.generation_config
    asked.num_beams, asked.num_return_sequences, asked.stop_strings, asked.return_dict_in_generate = 2, 2, ["e"], True
    run.train(silent())
    assert (tmp_path / "out" / "samples.md").read_text().count("**After**") == 1
    assert caplog.text.count("asks for num_return_sequences=2; one text is written") == 1

    impossible = start(describe(tmp_path / "other", trainer={"steps": 1, "gradient_accumulation": 1}))
    impossible.model.generation_config.dola_layers = "high"
    with pytest.raises(ConfigError, match=r"no samples: .* cannot be done here .*; the adapter is done, in "):
        impossible.train(silent())
    assert (tmp_path / "other" / "out" / "adapter" / "adapter_config.json").exists()


def test_samples_are_taken_from_the_data_when_none_are_given(tmp_path: Path) -> None:
    config = describe(tmp_path, samples={"count": 2})
    tokenizer = byte_tokenizer()
    prompts = [tokenizer.decode(ids) for ids in prepare(config, tokenizer, 256).prompts]
    assert prompts == [
        "<|im_start|>user\nSay ape\nnow<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nSay bee<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_pipe_gets_lines_and_no_bar(whole: Whole) -> None:
    lines = whole[3].splitlines()
    assert [line.split("  ")[0] for line in lines if "/8" in line] == ["step 3/8", "step 6/8", "step 8/8"]
    assert sum("perplexity" in line for line in lines) == 3


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(tmp_path: Path) -> None:
    screen = io.StringIO()
    start(describe(tmp_path, trainer={"steps": 2})).train(
        Console(file=screen, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    )
    for part in ("2/2", "loss ", "tokens/s", "left"):
        assert part in screen.getvalue()


def test_the_plan(tmp_path: Path) -> None:
    config = describe(tmp_path, data={"validation": 0.25}, trainer={"steps": None, "epochs": 2})
    run = start(config)
    plan = run.plan(extra=[("peers on the route", "3")])
    tokenizer = byte_tokenizer()
    rows = prepare(config, tokenizer, 256).train
    lengths = [len(rows[index][0]) for index in range(len(rows))]
    assert (plan.records, plan.validation_records, plan.rows, plan.dropped) == (9, 3, 9, 0)
    assert (plan.tokens, plan.longest) == (sum(lengths), max(lengths))
    assert plan.learned_tokens == sum(rows[index][0].learned for index in range(len(rows)))
    assert plan.trainable_parameters == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert plan.parameters == sum(p.numel() for p in run.model.parameters())
    assert (plan.steps, plan.epochs, plan.widest_batch) == (6, 2.0, (2, max(lengths)))  # ceil(ceil(9 / 2) / 2) a pass
    assert plan.tokens_per_step == sum(lengths) / 3
    screen = io.StringIO()
    Console(file=screen, width=120).print(plan)
    for part in ("lora on tiny", "9 to train on, 3 to validate on", "(2.00 epochs)", "peers on the route", "3"):
        assert part in screen.getvalue()


def test_the_plan_says_what_of_the_data_is_read_otherwise(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "mood": "gay"}]
    write_jsonl(tmp_path / "data.jsonl", [{"conversations": said, "id": 7}] * 2)
    write_jsonl(tmp_path / "held.jsonl", [{"conversations": said}])
    screen = io.StringIO()
    Console(file=screen, width=200).print(
        start(describe(tmp_path, data={"validation": str(tmp_path / "held.jsonl")})).plan()
    )
    shown = [re.split(r"\s{2,}", line.strip()) for line in screen.getvalue().splitlines()]
    for line in (
        ["roles", "'human' read as user (3), 'gpt' read as assistant (3)"],
        ["not read", "the column 'id' (2)"],
        ["not shown by the template", "'mood' (3)"],
    ):
        assert line in shown


def test_a_padding_token_that_the_model_was_not_resized_for(tmp_path: Path) -> None:
    """Padding is never looked up in the model's table of embeddings: the losses are those with another one."""
    config = describe(tmp_path / "known")
    start(config).train(silent())
    added = describe(tmp_path / "added")
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    prepared = prepare(added, tokenizer, 256, vocabulary_size(model.config))
    TuneRun(added, model, tokenizer, prepared).train(silent())
    assert losses(added) == losses(config)


def test_a_record_with_a_token_that_the_model_lacks(command: Command, tmp_path: Path) -> None:
    """Said before any peer is asked."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().config.save_pretrained(tmp_path / "model")
    file = described(tmp_path, model=str(tmp_path / "model"))
    write_jsonl(tmp_path / "data.jsonl", [*ALPACA[:2], {"instruction": "q", "output": "<tool>"}])
    assert command("tune", file).stderr == (
        f"error: {tmp_path}/data.jsonl: line 3 holds the token '<tool>' with the id 260, and the model has embeddings"
        " for ids up to 259; use the model's own tokenizer, or a model resized for this one\n"
    )


def test_half_a_character_is_found_where_it_stands(command: Command, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    tiny_llama().config.save_pretrained(tmp_path / "model")
    file = described(tmp_path, model=str(tmp_path / "model"))
    write_jsonl(tmp_path / "data.jsonl", [*ALPACA[:2], {"instruction": "hi \ud83d", "output": "a"}])
    assert command("tune", file).stderr.startswith(f"error: {tmp_path}/data.jsonl: line 3 holds half a character")


def test_steps_are_counted_as_trainer_counts_them(tmp_path: Path) -> None:
    config = describe(tmp_path, trainer={"steps": None, "epochs": 1.5, "batch_size": 5, "gradient_accumulation": 2})
    run = start(config)
    assert run.steps == count_steps(12, config.trainer) == 3
    run.train(silent())
    assert list(losses(config)) == [1, 2, 3]


def test_the_largest_numbers_that_are_taken_can_be_trained_with(tmp_path: Path) -> None:
    most = {
        "batch_size",
        "gradient_accumulation",
        "warmup",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
    }
    trainer = dict.fromkeys(most, 2**31 - 1)
    config = describe(tmp_path, data={"validation": 0.2}, trainer={**trainer, "steps": 1}, samples={"count": 2**31 - 1})
    assert start(config).train(silent()).steps == 1


@pytest.mark.parametrize("validation", [0.25, 0.01])
def test_the_split_is_seeded_and_takes_at_least_one(tmp_path: Path, validation: float) -> None:
    def split(seed: int) -> tuple[str, int, int]:
        config = describe(tmp_path, data={"validation": validation}, trainer={"seed": seed})
        prepared = prepare(config, byte_tokenizer(), 256)
        assert prepared.validation is not None
        return prepared.validation.fingerprint(), prepared.records, prepared.validation_records

    assert split(1) == split(1)
    assert split(1)[0] != split(3)[0]
    assert split(1)[1:] == ((9, 3) if validation == 0.25 else (11, 1))


def test_dropped_records_are_counted_and_none_left_is_an_error(tmp_path: Path) -> None:
    config = describe(tmp_path, data={"max_length": 36, "too_long": "drop"})
    prepared = prepare(config, byte_tokenizer(), 256)
    assert 0 < prepared.dropped < 12
    assert prepared.records == 12 - prepared.dropped
    nothing = describe(tmp_path, data={"max_length": 8, "too_long": "drop"})
    with pytest.raises(DataError, match=r"data\.jsonl: every record was dropped: none fits in 8 tokens"):
        prepare(nothing, byte_tokenizer(), 256)


def test_a_record_longer_than_the_context_is_refused_by_its_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [*ALPACA[:2], {"instruction": "q", "output": "long" * 60}])
    with pytest.raises(DataError, match=r"data\.jsonl: line 3 is 262 tokens long, over data\.max_length \(256\)"):
        prepare(describe(tmp_path), byte_tokenizer(), context_length(tiny_llama().config))


def test_the_context_of_a_model() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=78)) == 78
    assert context_length(MptConfig(max_seq_len=79)) == 79
    assert context_length(BloomConfig()) is None  # alibi sets no limit


def described(folder: Path, **keys: Any) -> Path:
    """The file of a run that gets as far as to its data."""
    write_jsonl(folder / "data.jsonl", ALPACA)
    values = {
        "initial_peers": "nobody",
        "data": {"path": str(folder / "data.jsonl"), "max_length": 100},
        "output": str(folder / "out"),
        **keys,
    }
    file = folder / "tune.yaml"
    file.write_text(json.dumps(values))  # which is YAML too
    return file


def test_the_context_is_that_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: str, name: str, revision: str | None, **_: object) -> str:
        LlamaConfig(max_position_embeddings=64 if revision == "old" else 256).save_pretrained(tmp_path)
        return str(tmp_path / name)

    monkeypatch.setattr("protocol.model.checkpoint.hf_hub_download", download)
    monkeypatch.setattr("client.tokenizer.load_tokenizer", lambda *_: byte_tokenizer())
    with pytest.raises(ConfigError, match=r"data\.max_length: 100 tokens do not fit, some/model has room for 64"):
        run_tune(described(tmp_path, model="some/model", revision="old"), [], resume=False, plan_only=False)


def test_a_model_with_a_tokenizer_and_no_configuration(command: Command, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = described(tmp_path, model=str(tmp_path / "model"))
    assert "model' has no config.json; expected a Hugging Face model folder" in command("tune", file).refusal()


def test_a_file_with_an_equals_sign_in_its_path_is_no_override(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    for file in (tmp_path / "lr=1" / "tune.yaml", Path("lr=1/tune.yaml")):
        file.write_text("modell: m\n")
        assert command("tune", file).stderr.startswith(f"error: {file}: the key 'model' is missing")
        file.unlink()
    assert command("tune", file.absolute()).stderr.endswith("tune.yaml: can't be read: No such file or directory\n")
    long = "x" * 300
    assert command("tune", f"samples.prompts=[{long}]").stderr.startswith("error: the configuration: the key 'model'")


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = describe(tmp_path, trainer={"tensorboard": True})
    with pytest.raises(ConfigError, match=r"trainer\.tensorboard needs the package tensorboard"):
        check_output(config, resume=False)
    assert not config.output.exists()


def test_an_interrupt_among_the_samples_keeps_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    config = describe(tmp_path, trainer={"steps": 1})
    run = start(config)
    monkeypatch.setattr("client.tune.running.run.generate_samples", stop)
    with pytest.raises(Interrupted, match="stopped while writing samples; the adapter is done, in"):
        run.train(silent())
    assert (config.output / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["prompt", "prefix", "ia3", "dora"])
def test_other_methods_train_and_sample(tmp_path: Path, method: str) -> None:
    config = describe(tmp_path, adapter={"method": method}, trainer={"steps": 2})
    result = start(config).train(silent())
    assert min(result.loss_before, result.loss_after) > 0
    assert (config.output / "samples.md").exists()
