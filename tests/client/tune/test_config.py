"""The description of a run: what is accepted, and the sentence for what is not."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from pydantic import BaseModel

from client.tune.description.config import (
    DataConfig,
    SamplesConfig,
    TrainerConfig,
    TuneConfig,
    json_schema,
    load_config,
)
from client.tune.description.example import example_yaml
from client.tune.description.peft_methods import METHODS, attach, peft_config
from client.tune.errors import ConfigError
from tests.tools.tune import tiny_llama

MINIMAL = {"model": "m", "data": {"path": "d.jsonl"}, "output": "out"}


def write(folder: Path, values: dict[str, Any] | str) -> Path:
    path = folder / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def sentence(folder: Path, values: dict[str, Any] | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, values), overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.removeprefix(f"{folder / 'run.yaml'}: ")


def test_the_example_is_a_valid_run_that_names_every_key(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, example_yaml()))
    assert config.adapter.options() == {
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"
    }  # fmt: skip
    for section in (TuneConfig, DataConfig, TrainerConfig, SamplesConfig):
        for key in section.model_fields:
            assert f"{key}:" in example_yaml(), key


def test_the_defaults_of_the_example_are_the_defaults(tmp_path: Path) -> None:
    shown = load_config(write(tmp_path, example_yaml()))
    plain = load_config(write(tmp_path, MINIMAL))
    assert shown.samples == plain.samples
    assert shown.trainer.model_copy(update={"epochs": None, "eval_every": None}) == plain.trainer


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "trainer": {"epochs": 2, "batch_size": 4}})
    config = load_config(
        path, ["trainer.steps=7", "trainer.learning_rate=2e-4", "data.path=[a.csv, b.csv]", "revision=k"]
    )
    assert (config.trainer.steps, config.trainer.epochs, config.trainer.batch_size) == (7, None, 4)
    assert config.trainer.learning_rate == 2e-4
    assert config.data.path == [Path("a.csv"), Path("b.csv")]
    assert config.revision == "k"
    assert load_config(None, ["model=m", "data.path=d.json", "output=o"]).adapter.method == "lora"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trainer": {"stps": 3}}, "trainer: unknown key 'stps'; did you mean 'steps'?"),
        ({"adapter": {"method": "lora", "alpha": 3}}, "adapter: unknown key 'alpha'; did you mean 'lora_alpha'?"),
        ({"lerning_rate": 1}, "unknown key 'lerning_rate'; did you mean 'trainer.learning_rate'?"),
        ({"network": {"codec_outt": "bf16"}}, "network: unknown key 'codec_outt'; did you mean 'codec_out'?"),
        ({"network": {"zzz": 1}}, "network: unknown key 'zzz'; known are carrier, allowed_peers,"),
        ({"codec_gradient": "bf16"}, "unknown key 'codec_gradient'; did you mean 'network.codec_gradients'?"),
        ({"qqq": 1}, "unknown key 'qqq'; known are model, revision,"),
        ({"adapter": {"method": "lorra"}}, "adapter.method: unknown method 'lorra'; did you mean 'lora'?"),
        ({"adapter": {"r": 3}}, "adapter.method is missing; one of lora, rslora, dora, adalora"),
        ({"adapter": {"method": "dora", "use_dora": False}}, "adapter: the method dora sets 'use_dora' itself"),
        ({"adapter": {"method": "lora", "r": "many"}}, "adapter.r: must be a valid integer"),
        ({"trainer": {"batch_size": 0}}, "trainer.batch_size: must be greater than 0 (it is 0)"),
        ({"trainer": {"epochs": float("inf")}}, "trainer.epochs: must be a finite number (it is inf)"),
        ({"trainer": {"epochs": 1e300}}, "trainer.epochs: must be less than or equal to 2147483647"),
        ({"trainer": {"warmup": float("inf")}}, "trainer.warmup: must be a finite number (it is inf)"),
        ({"trainer": {"batch_size": 10**20}}, "trainer.batch_size: must be less than or equal to 2147483647 (it is 1"),
        ({"samples": {"count": 10**20}}, "samples.count: must be less than or equal to 2147483647"),
        ({"network": {"silence_timeout": float("inf")}}, "network.silence_timeout: must be a finite number"),
        ({"adapter": {"method": "lora", "lora_dropout": float("nan")}}, "adapter.lora_dropout: must be a finite"),
        ({"data": {"path": "d", "validation": float("inf")}}, "data.validation: a share must be at least 0 and"),
        ({"trainer": {"steps": 1, "epochs": 1}}, "trainer: give steps or epochs, not both"),
        ({"trainer": 3}, "trainer: must hold keys and values (it is 3)"),
        ({"data": {"path": "d.json", "validation": 1}}, "data.validation: a share must be at least 0 and"),
        ({"data": {"path": "d.json", "columns": {"frage": "q"}}}, "data.columns: unknown column 'frage'"),
        ({"data": {"path": []}}, "data.path: must not be empty"),
        ({"data": {}}, "the key 'data.path' is missing"),
        ({"adapter": {"method": "prefix"}, "data": {"path": "d", "packing": True}}, "data.packing does not go with"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_sentence(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert sentence(tmp_path, {**MINIMAL, **change}).startswith(expected)


def test_every_path_is_read_in_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/ada")
    config = load_config(None, ["model=~/m", "data.path=[~/a.csv, ~/b/*.csv]", "data.validation=~/v.csv", "output=~/o"])
    assert (config.model, config.output) == tuple(
        kind(f"/homes/ada/{name}") for kind, name in ((str, "m"), (Path, "o"))
    )
    assert config.data.path == [Path("/homes/ada/a.csv"), Path("/homes/ada/b/*.csv")]
    assert config.data.validation == Path("/homes/ada/v.csv")
    url = "https://example.org//d.jsonl"
    for key in ("data.path", "data.validation", "output"):
        said = sentence(tmp_path, MINIMAL, f"{key}={url}")
        assert said.startswith(f"{key}{'.0' if key == 'data.path' else ''}: {url} is a URL; expected a path on this")
        assert "in the home of a user" in sentence(tmp_path, MINIMAL, f"{key}=~nobody-here/x")
    assert "in the home of a user" in sentence(tmp_path, MINIMAL, "model=~nobody-here/x")
    described = json.dumps(json_schema())
    assert described.count('"format": "path"') == 3, "a new path is read as a LocalPath too, and tried here"


@pytest.mark.parametrize(
    "section", [key for key, value in TuneConfig.model_validate(MINIMAL) if isinstance(value, BaseModel)]
)
def test_no_section_takes_an_unknown_key(tmp_path: Path, section: str) -> None:
    unknown = {"zzz": 1, **({"method": "lora"} if section == "adapter" else {})}
    assert f"{section}: unknown key 'zzz'; known are" in sentence(tmp_path, {**MINIMAL, section: unknown})


def test_a_character_in_two_halves_is_one(tmp_path: Path) -> None:
    """As `json.dumps` writes it, and JSON is YAML."""
    assert load_config(write(tmp_path, json.dumps({**MINIMAL, "output": "😀"}))).output == Path("😀")


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    text = sentence(tmp_path, {**MINIMAL, "trainer": {"stps": 3, "seed": -1}})
    assert "'stps'" in text
    assert "trainer.seed" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "is not valid YAML on line 1"),
        ("model: a\nmodel: b\n", "is not valid YAML on line 2: the key 'model' stands twice"),
        ("output: o\nmodel: {{MODEL}}\n", "is not valid YAML on line 2: found unhashable key"),
        ("? [a]\n: b\n", "is not valid YAML on line 1: found unhashable key"),
        ("model: m\nd: 2024-99-99\n", "is not valid YAML on line 2: '2024-99-99' is no value"),
        ('model: m\noutput: "hi \\ud83d"\n', "is not valid YAML on line 2: 'hi \\ud83d' holds half a character"),
        ("model: !!bool maybe\n", "is not valid YAML on line 1: 'maybe' is no value"),
        ("just words", "must hold keys and values"),
        ("", "must hold keys and values"),
    ],
)
def test_a_file_that_is_no_description(tmp_path: Path, text: str, expected: str) -> None:
    assert sentence(tmp_path, text).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "'steps' is not an override; write it as section.key=value"),
        ("trainer..steps=1", "'trainer..steps=1' is not an override"),
        (
            'data.system="\\ude00"',
            """'data.system="\\\\ude00"': the value is not valid YAML on line 1: '\\ude00' holds half a""",
        ),
        ("trainer.steps=[", "'trainer.steps=[': the value is not valid YAML"),
        ("trainer.seed=2024-99-99", "'trainer.seed=2024-99-99': the value is not valid YAML"),
        ("trainer.seed={{SEED}}", "'trainer.seed={{SEED}}': the value is not valid YAML"),
        ("trainer.stps=1", "trainer: unknown key 'stps'; did you mean 'steps'?"),
    ],
)
def test_a_wrong_flag(tmp_path: Path, override: str, expected: str) -> None:
    assert sentence(tmp_path, MINIMAL, override).startswith(expected)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: can't be read: No such file"):
        load_config(Path("nowhere.yaml"))


def test_the_schema_has_every_method_with_its_options() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert {f"{method.capitalize()}Options" for method in METHODS} <= schema["$defs"].keys()
    assert "target_r" in schema["$defs"]["AdaloraOptions"]["properties"]
    assert schema["additionalProperties"] is False


OPTIONS_OF: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "rank_pattern": {"q_proj": 2}, "init_lora_weights": "pissa_niter_4"},
    "rslora": {"r": 3},
    "dora": {"r": 3},
    "adalora": {"init_r": 4, "target_r": 2},
    "ia3": {},
    "vera": {"r": 8},
    "loha": {"r": 2},
    "lokr": {"r": 2, "decompose_factor": 4},
    "oft": {"oft_block_size": 8},
    "prompt": {"num_virtual_tokens": 3},
    "ptuning": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16},
    "prefix": {"num_virtual_tokens": 3, "prefix_projection": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_attaches_with_the_options_given(method: str) -> None:
    options = OPTIONS_OF[method]
    config = TuneConfig.model_validate({**MINIMAL, "adapter": {"method": method, **options}})
    model = attach(tiny_llama(), peft_config(config.adapter, "m", steps=10))
    made = model.peft_config["default"]
    assert isinstance(made, METHODS[method].config)
    assert {name: getattr(made, name) for name in options} == options
    assert made.task_type == "CAUSAL_LM"
    assert 0 < model.get_nb_trainable_parameters()[0] < 20_000


def test_the_method_fixes_what_its_name_says() -> None:
    def made(method: str) -> peft.PeftConfig:
        return peft_config(TuneConfig.model_validate({**MINIMAL, "adapter": {"method": method}}).adapter, "m", steps=10)

    assert made("rslora").use_rslora is True
    assert made("dora").use_dora is True
    assert made("adalora").total_step == 10


def test_the_adapter_is_of_the_revision_of_the_model_that_was_asked_for() -> None:
    """Its own tokenizer too, and what PEFT writes down for whoever loads the adapter."""
    adapter = {"method": "prompt", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Answer"}
    made = peft_config(TuneConfig.model_validate({**MINIMAL, "adapter": adapter}).adapter, "m", 10, "old")
    assert (made.revision, made.tokenizer_name_or_path, made.tokenizer_kwargs) == ("old", "m", {"revision": "old"})


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (
            {"method": "lora", "target_modules": ["q_proj", "qkv"]},
            "adapter.target_modules: 'qkv' matches no module of LlamaForCausalLM; it has down_proj, embed_tokens,",
        ),
        ({"method": "lora", "target_modules": ".*wrong"}, "adapter.target_modules: '.*wrong' matches no module"),
        ({"method": "lora", "target_modules": "("}, "adapter.target_modules: '(' is no regular expression"),
        ({"method": "lora", "modules_to_save": ["head"]}, "adapter.modules_to_save: 'head' matches no module"),
        ({"method": "adalora", "tinit": 6, "tfinal": 6}, "adapter: PEFT refuses these options for adalora"),
        ({"method": "lora", "init_lora_weights": "magic"}, "adapter: PEFT can't attach this adapter"),
        ({"method": "lora", "init_lora_weights": "eva"}, "adapter.init_lora_weights: eva needs more of the blocks"),
        (
            {"method": "lora", "r": 2**63 - 1},
            "adapter: PEFT can't attach this adapter: Storage size calculation overflow",
        ),
        ({"method": "lora", "lora_alpha": 10**400}, "adapter: PEFT can't attach this adapter: integer division result"),
        ({"method": "loha", "r": 0}, "adapter: PEFT can't attach this adapter"),
        (
            {"method": "lora", "trainable_token_indices": [999]},
            "adapter: it trains tokens that the model has no embeddin",
        ),
    ],
)
def test_an_adapter_that_does_not_go_on_the_model(adapter: dict[str, Any], expected: str) -> None:
    options = TuneConfig.model_validate({**MINIMAL, "adapter": adapter}).adapter
    with pytest.raises(ConfigError) as caught:
        attach(tiny_llama(), peft_config(options, "m", steps=10))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_max_length_is_checked_against_the_context() -> None:
    def config(**adapter: Any) -> TuneConfig:
        data = {"path": "d", "max_length": 100}
        return TuneConfig.model_validate({**MINIMAL, "data": data, "adapter": {"method": "lora", **adapter}})

    assert config().max_length(None) == config().max_length(100) == 100
    with pytest.raises(ConfigError, match=r"data\.max_length: 100 tokens do not fit, m has room for 90"):
        config(method="prompt", num_virtual_tokens=10).max_length(100)
    free = TuneConfig.model_validate(MINIMAL)
    assert (free.max_length(None), free.max_length(512), free.max_length(100_000)) == (2048, 512, 2048)


def test_an_option_of_the_network_without_a_value_is_one_that_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text(
        "model: m\noutput: o\ndata: {path: d.jsonl}\nnetwork:\n  codec_out:\n  verify: 0.5\n"
    )
    network = load_config(tmp_path / "tune.yaml").network
    assert network.model_dump(exclude_unset=True) == {"verify": 0.5}
