"""`peer certify`: codecs are measured where spans would meet, and judged by stated thresholds."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client.certify import certificate
from client.certify.boundaries import Boundaries
from client.certify.certificate import Effect
from protocol.codecs import NAMES, round_trip
from tests.tools.command import Command
from tests.tools.words import save_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"w{(i * i) % 90 + 3}" for i in range(600)))
    return file


def run(command: Command, *arguments: Any) -> dict[str, Any]:
    outcome = command("certify", *arguments, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.stdout)


def test_a_model_is_certified(command: Command, llama: Path, text: Path) -> None:
    found = run(command, llama, "--data", text, "--tokens", "256", "--steps", "4")
    codecs = {entry["codec"]: entry for entry in found["codecs"]}
    assert codecs.keys() | {"none"} == NAMES.keys()
    exact = codecs["lossless"]
    assert (exact["kl"], exact["top1"], exact["loss"], exact["safe"]) == (0, 1, found["loss"], True)
    assert exact["perplexity"] == pytest.approx(found["perplexity"])
    assert 0 <= codecs["f16"]["kl"] < codecs["bf16"]["kl"] < codecs["int8"]["kl"] < 1e-2
    sizes = [codecs[name]["bytes_per_value"] for name in ("lossless", "bf16", "f16", "int8")]
    assert sizes[0] < 4
    assert sizes[1:] == [2, 2, (32 + 5) / 32]  # rows of 32 values
    assert all(codecs[name]["loss"] != found["loss"] for name in ("bf16", "f16", "int8"))
    assert found["spans"] == 2


def test_a_model_that_sees_is_certified(
    command: Command, models: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(models("qwen2_5_vl"), tmp_path / "qwen")
    save_tokenizer(folder, 128)
    found = run(command, folder, "--data", text, "--tokens", "128", "--steps", "1")
    assert found["codecs"][0]["safe"]


@pytest.mark.parametrize(("asked", "measured"), [("1", 128), ("300", 256), ("5000000", 640)])
def test_it_says_how_much_text_was_measured(
    command: Command, llama: Path, text: Path, asked: str, measured: int
) -> None:
    asking = ("certify", llama, "--data", text, "--tokens", asked, "--steps", "1")
    assert json.loads(command(*asking, "--json").stdout)["tokens"] == measured
    assert f"{measured} tokens of text" in command(*asking).stdout


def test_the_table_says_what_is_safe(command: Command, llama: Path, text: Path) -> None:
    outcome = command("certify", llama, "--data", text, "--tokens", "128", "--steps", "1")
    assert outcome.code == 0
    words = outcome.stdout.split()
    assert {"none", *NAMES, "yes", "KL", "top-1"} <= set(words)


def test_every_boundary_is_crossed_once_each_way(models: Callable[[str], Path]) -> None:
    """By hand: the blocks run one after the other, the hidden states coded before 0 and 2 and after the last."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()
    hidden = torch.randn(2, 6, 32)
    rotary = plain.model.rotary_emb(hidden, torch.arange(6)[None])
    expected = hidden
    for index, block in enumerate(plain.model.layers):
        if index in (0, 2):
            expected = round_trip(expected, NAMES["int8"])
        expected = block(expected, position_embeddings=rotary)
    expected = plain.model.norm(round_trip(expected, NAMES["int8"]))
    boundaries = Boundaries(model, 2)
    with boundaries.using("int8"), torch.no_grad():
        found = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert boundaries.values == 3 * hidden.numel()
    assert not torch.equal(model.model(inputs_embeds=hidden).last_hidden_state, found)


def test_gradients_are_coded_on_their_way_back(models: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama"))
    boundaries = Boundaries(model, 1)
    hidden = torch.randn(1, 4, 32, requires_grad=True)
    with boundaries.using("none", "bf16"):
        model.model(inputs_embeds=hidden).last_hidden_state.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, hidden.grad.bfloat16().float())
    assert boundaries.bytes == 4 * boundaries.values


@pytest.mark.parametrize(
    ("changes", "excesses"),
    [
        ({}, []),
        ({"kl": 2 * certificate.MAX_KL}, ["KL"]),
        ({"top1": certificate.MIN_TOP1 - 0.01}, ["top-1"]),
        ({"loss_change": -2 * certificate.MAX_LOSS}, ["loss"]),
        ({"kl": math.nan, "loss_change": math.nan}, ["KL", "loss"]),
    ],
)
def test_the_thresholds(changes: dict[str, float], excesses: list[str]) -> None:
    within = {"kl": 1e-4, "top1": 1.0, "perplexity": 9.0, "loss": 2.0, "loss_change": 0.0, "bytes_per_value": 2.0}
    effect = Effect("bf16", "bf16", **(within | changes))
    assert (effect.excesses, effect.is_safe) == (excesses, not excesses)


def test_bad_usage_is_told(command: Command, llama: Path, text: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("w5 w6 w7")
    assert "has 4 tokens, too few" in command("certify", llama, "--data", few).refusal()
    assert "more than the model's 5 blocks" in command("certify", llama, "--data", text, "--spans", "6").refusal()
    assert "'int4' is unknown" in command("certify", llama, "--dtype", "int4").refusal()
    assert "The device 'gpu' cannot be used" in command("certify", llama, "--device", "gpu").refusal()
    assert "has no config.json" in command("certify", tmp_path / "nothing").refusal()


def test_a_model_that_lacks_a_shard_is_told(command: Command, llama: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    shard = min(folder.glob("*.safetensors"))
    shard.unlink()
    said = command("certify", folder, "--data", text).refusal()
    assert f"lacks its shard {shard.name}; download the model again" in said
