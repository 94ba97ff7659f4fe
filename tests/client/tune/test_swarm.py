"""`peer tune` over a swarm: killed, interrupted or with peers dying under it, it comes to the very same losses."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from client.commands.tune import run_tune
from tests.tools.command import Command
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm
from tests.tools.tune import ALPACA, CONTEXT, byte_tokenizer, tiny_llama, write_jsonl
from tests.tools.words import save_tokenizer

STEPS, SAVE_EVERY = 30, 5
AFTER = 7
"""The step after which something happens: not one that has just been saved."""


@dataclass(frozen=True)
class Place:
    """A swarm of the tiny llama whose last blocks two peers hold, each under a name."""

    swarm: Swarm
    model: Path
    heirs: dict[str, Peer]

    def describe(self, folder: Path, **sections: Any) -> Path:
        """The file of a run with dropout, so that random numbers matter; `sections` change it."""
        folder.mkdir(exist_ok=True)
        values: dict[str, Any] = {
            "model": str(self.model),
            "initial_peers": self.swarm.initial_peers,
            "data": {"path": str(write_jsonl(folder / "data.jsonl", ALPACA))},
            "adapter": {"method": "lora", "r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]},
            "trainer": {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "save_every": SAVE_EVERY},
            "samples": {"count": 0},
            "output": str(folder / "out"),
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        file = folder / "tune.yaml"
        file.write_text(yaml.safe_dump(values))
        return file


@pytest.fixture(scope="module")
def place(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    model = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    with new_swarm(fork_server) as swarm:
        swarm.serve(model, "0:1")
        heirs = {name: swarm.serve(model, "1:3", options=["--name", name])[0] for name in ("ada", "bob")}
        yield Place(swarm, model, heirs)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setattr(
        "client.tune.running.run.plot_losses", lambda lines: b"drawn"
    )  # matplotlib takes a second each time
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.tune.running.run.plot_losses", lambda lines: b"drawn")
        run_tune(place.describe(folder), [], resume=False, plan_only=False)
    return folder / "out"


def losses(output: Path) -> dict[int, float]:
    """Step -> training loss, as logged so far."""
    log = output / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    entries = (json.loads(line) for line in lines if line.endswith("\n"))
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while max(losses(output), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.003)


def after_step(output: Path, action: Callable[[], Any]) -> threading.Thread:
    """Does something in the middle of the run that writes to `output`."""

    def watch() -> None:
        wait_for_step(output, AFTER)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def assert_same(output: Path, whole: Path) -> None:
    assert len(losses(output)) == STEPS
    assert losses(output) == losses(whole)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (output, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_that_only_the_swarm_has(
    place: Place, whole: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name: tokenizer, embeddings and head come from the peers that have the folder."""
    monkeypatch.setenv("HIVETUNE_CACHE", str(tmp_path / "cache"))
    done = command("tune", place.describe(tmp_path, model=place.model.name))
    assert done.code == 0, done
    assert_same(tmp_path / "out", whole)
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).name == place.model.name


def test_ctrl_c_and_then_what_it_says(place: Place, whole: Path, command: Command, tmp_path: Path) -> None:
    file, output = place.describe(tmp_path), tmp_path / "out"
    thread = after_step(output, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = command("tune", file)
    thread.join()
    assert stopped.code == 1
    said = re.fullmatch(
        rf"error: stopped after step (\d+) of {STEPS}, which is saved in \S+; go on with `peer (.+)`\n", stopped.stderr
    )
    assert said, stopped.stderr
    assert AFTER <= int(said[1]) == max(losses(output)) < STEPS
    assert command(*said[2].split()).code == 0
    assert_same(output, whole)


def test_kill_9(place: Place, whole: Path, command: Command, tmp_path: Path) -> None:
    """In a process of its own; what was done after the last checkpoint is done again."""
    file, output = place.describe(tmp_path), tmp_path / "out"
    process = place.swarm.launch("tune", str(file))
    wait_for_step(output, AFTER)
    process.kill()
    assert max(losses(output)) < STEPS
    assert not (output / "adapter").exists()
    resumed = command("tune", file, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert_same(output, whole)


def test_peers_are_killed_under_it(
    place: Place, whole: Path, command: Command, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Whichever of them it uses, it stops with both, until another one has come and they are gone."""
    file, output = place.describe(tmp_path), tmp_path / "out"

    def replace() -> None:
        for peer in place.heirs.values():
            peer.send(signal.SIGSTOP)
        place.swarm.serve(place.model, "1:3", options=["--name", "carl"])
        for peer in place.heirs.values():
            peer.kill()

    thread = after_step(output, replace)
    finished = command("tune", file)
    thread.join()
    assert finished.code == 0, finished.stderr
    assert re.search(r"peer (ada|bob) failed", caplog.text)
    assert_same(output, whole)


def test_generate_stops_at_the_strings_of_a_checkpoint(place: Place, command: Command, tmp_path: Path) -> None:
    ask = ["--max-new-tokens", "12", "--initial-peers", place.swarm.initial_peers[0]]
    whole = command("generate", place.model, "Say yak", *ask).stdout.rstrip("\n")
    stop = next(letter for letter in whole[1:] if letter.isascii())
    model = shutil.copytree(place.model, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "stop_strings": [stop]}))
    assert command("generate", model, "Say yak", *ask).stdout.rstrip("\n") == whole[: whole.index(stop) + 1]


def test_what_is_printed_into_a_pipe_breaks_no_path(place: Place, command: Command, tmp_path: Path) -> None:
    model = shutil.copytree(place.model, tmp_path / ("long" * 30))
    planned = command("tune", place.describe(tmp_path / "run", model=str(model)), "--plan")
    assert f"lora on {model}" in planned.stdout.splitlines()


MISTAKES: dict[str, tuple[dict[str, Any], int, str]] = {
    "column": (
        {"data": {"format": "alpaca", "columns": {"output": "reply"}}},
        2,
        "data.jsonl: line 1 has the columns 'instruction', 'input', 'output'; known are alpaca (instruction, reply)",
    ),
    "device": ({"device": "gpu"}, 2, "The device 'gpu' cannot be used"),
    "key": ({"trainer": {"learning_rat": 1e-3}}, 2, "did you mean 'learning_rate'?"),
    "module": ({"adapter": {"target_modules": ["q_proj", "query"]}}, 2, "'query' matches no module"),
    "pins": ({"network": {"pins": {"0-2": []}}}, 2, "'0-2' is not a span of blocks; expected START:END"),
    "record": ({"data": {"path": "long.jsonl"}}, 2, f"over data.max_length ({CONTEXT})"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, place: Place, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no output behind."""
    sections, code, expected = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "long.jsonl", [*ALPACA[:2], {"instruction": "q", "output": "long" * CONTEXT}])
    outcome = command("tune", place.describe(tmp_path, **sections))
    assert outcome.code == code, outcome
    assert not outcome.stdout
    assert re.fullmatch(r"error: .+\n", outcome.stderr), outcome.stderr
    assert expected in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_sees(
    swarm: Swarm, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter is one that PEFT puts on what Transformers loads from the same folder."""
    monkeypatch.setattr("client.tune.running.run.plot_losses", lambda lines: b"drawn")
    model = shutil.copytree(models("gemma3_full"), tmp_path / "gemma3")
    save_tokenizer(model, 128)
    swarm.serve(model, "0:5")
    run_tune(
        Place(swarm, model, {}).describe(tmp_path / "run"),
        ["trainer.steps=2", "samples.count=1", "data.max_length=64"],
        resume=False,
        plan_only=False,
    )
    assert len(losses(tmp_path / "run/out")) == 2
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "run/out/adapter")
    trained = [p for name, p in tuned.named_parameters() if "language_model" in name and "lora_B" in name]
    assert len(trained) == 10
    assert all(parameter.any() for parameter in trained)
