"""Where a client's model goes: `device`, `device_map`, `--device`, and GPUs that lack memory or are one too many."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml

from client.commands.tune import run_tune
from protocol.errors import BadUsage
from tests.tools.command import Command
from tests.tools.swarm import Both


@pytest.mark.parametrize("option", ["device", "device_map", "whole map", "default"])
def test_a_model_is_put_on_a_device(option: str, llamas: Both, other_device: torch.device) -> None:
    name, index = str(other_device), other_device.index
    options = {
        "device": {"device": name},
        "device_map": {"device_map": index},
        "whole map": {"device_map": {"": index}},
    }
    before = torch.get_default_device()
    torch.set_default_device(name if option == "default" else "cpu")
    try:
        model = llamas.swarm.connect(llamas.path, **options.get(option, {}))
        assert model.device == other_device
        assert model(torch.arange(3, 9, device=other_device)[None]).logits.device == other_device
    finally:
        torch.set_default_device(before)


def test_a_device_without_room(
    llamas: Both,
    device: torch.device,
    pretended: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that was named is refused, one that was found is left alone."""
    limit = pretended.bytes_limit()
    pretended.limit(pretended.bytes_now() + 8000)  # enough for a trial, and not for the embeddings
    with pytest.raises(BadUsage, match=r"takes 0\.0 GiB, and cuda:0 has less than that free; use another device"):
        llamas.swarm.connect(llamas.path, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    model = llamas.swarm.connect(llamas.path, device="auto")
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    assert caplog.messages == ["cuda:0 has no room for the 0.0 GiB that this machine holds of the model."]
    pretended.limit(limit)
    assert llamas.swarm.connect(llamas.path, device="auto").device == device


def test_a_trainer_that_sees_two_gpus(
    llamas: Both, device: torch.device, pretended: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would copy the model to each."""
    tuned = peft.get_peft_model(llamas.remote(), peft.LoraConfig(r=4, task_type="CAUSAL_LM")).to(device)
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none")
    arguments._n_gpu = 2
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadUsage, match=r"^DataParallel, .* show it one GPU \(CUDA_VISIBLE_DEVICES=0\), or"):
        transformers.Trainer(tuned, arguments, train_dataset=rows).train()


def test_generate(llamas: Both, llama: Path, other_device: torch.device, command: Command) -> None:
    said = {
        where: command(
            "generate", llama, "w5 w6", "--initial-peers", llamas.swarm.initial_peers[0],
            "--max-new-tokens", 4, "--device", where,
        )
        for where in ("cpu", other_device)
    }  # fmt: skip
    assert said["cpu"].code == 0
    assert said["cpu"] == said[other_device]


def test_tune(
    llamas: Both, llama: Path, other_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device that it is told, also where Trainer would take another; the losses are those on the CPU."""
    data, seen, losses = tmp_path / "data.jsonl", set[torch.device](), []
    data.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w7"}) + "\n" for n in range(5, 15)))
    step = torch.optim.AdamW.step

    def watch(optimizer: torch.optim.AdamW, *rest: Any) -> Any:
        seen.update(tensor.device for group in optimizer.param_groups for tensor in group["params"])
        return step(optimizer, *rest)

    monkeypatch.setattr("client.tune.running.run.plot_losses", lambda lines: b"drawn")
    for where in ("cpu", str(other_device)):
        description = {
            "model": str(llama), "initial_peers": llamas.swarm.initial_peers, "data": {"path": str(data)},
            "adapter": {"method": "lora", "r": 4}, "output": str(tmp_path / where),
            "trainer": {"steps": 2, "batch_size": 2}, "samples": {"count": 1, "max_new_tokens": 2},
        }  # fmt: skip
        file = tmp_path / "tune.yaml"
        file.write_text(yaml.safe_dump(description))
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", watch)
            run_tune(file, [f"device={where}"], resume=False, plan_only=False)
        lines = (tmp_path / where / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert seen == {torch.device("cpu"), other_device}
    assert losses[0] == pytest.approx(losses[1])


def test_certify(llama: Path, device: torch.device, command: Command, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{n % 90 + 3}" for n in range(200)))
    found = [
        json.loads(command("certify", llama, "--data", text, "--steps", 1, "--json", "--device", where).stdout)
        for where in ("cpu", device)
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"])
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"])
