"""Two processes train one adapter, each through a client of its own: the figures of the same two without a swarm."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from client.ghosts.questions import RemoteWeightError
from tests.tools.command import Command
from tests.tools.swarm import Both

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
LOOPS = ("loop", "static graph", "unused", "PiSSA")
TRAINERS = ("trainer", "resumed")
Found = dict[str, list[list[dict[str, list[float]]]]]
"""Scenario -> of each process [the figures without a swarm, those through it]."""


@pytest.fixture(scope="module")
def launch(llamas: Both) -> Callable[..., Found]:
    def run(folder: Path, launcher: tuple[str, ...], *scenarios: str) -> Found:
        command = [sys.executable, "-m", *launcher, "-m", "tests.tools.data_parallel"]
        arguments = [str(llamas.path), *llamas.swarm.initial_peers, str(folder), *scenarios]
        ran = subprocess.run([*command, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=240)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        processes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
        return {name: [found[name] for found in processes] for name in scenarios}

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def by_torchrun(launch: Callable[..., Found], folder: Path) -> Found:
    return launch(folder, TORCHRUN, *LOOPS, *TRAINERS)


@pytest.fixture(scope="module")
def by_accelerate(launch: Callable[..., Found], tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch(tmp_path_factory.mktemp("accelerate"), ACCELERATE, "accelerator", "sft")


@pytest.mark.parametrize("scenario", LOOPS)
def test_a_plain_loop(scenario: str, by_torchrun: Found) -> None:
    """Peers may compute the two processes' calls together, so equal to rounding."""
    first, second = by_torchrun[scenario]
    for theirs, ours in first, second:
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        torch.testing.assert_close(torch.tensor(ours["gradients"]), torch.tensor(theirs["gradients"]))
        assert any(ours["gradients"])
    assert first[1]["losses"] != second[1]["losses"]
    assert first[1]["gradients"] == second[1]["gradients"]


def assert_equal(found: list[list[dict[str, list[float]]]]) -> None:
    """With DoRA, which peers compute for one client at a time, bit for bit."""
    (theirs, ours), second = found
    assert ours == theirs
    assert second == [theirs, ours]
    assert len(ours["norms"]) == 4


@pytest.mark.parametrize("scenario", TRAINERS)
def test_trainer(scenario: str, by_torchrun: Found) -> None:
    assert_equal(by_torchrun[scenario])


@pytest.mark.parametrize("scenario", ["accelerator", "sft"])
def test_accelerate_and_trl(scenario: str, by_accelerate: Found) -> None:
    assert_equal(by_accelerate[scenario])


def test_a_checkpoint(by_torchrun: Found, folder: Path) -> None:
    """It is written by the first process, with the random state of each, and both go on from it."""
    ours, theirs = (
        {file.name for file in (folder / kind / "trainer" / "checkpoint-2").iterdir()} for kind in ("remote", "local")
    )
    assert ours == theirs >= {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"}
    assert by_torchrun["resumed"] == by_torchrun["trainer"]


def test_deepspeed(launch: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 2, with a checkpoint; where DeepSpeed is installed, which builds a part of itself for minutes."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = launch(tmp_path, TORCHRUN, "DeepSpeed", "DeepSpeed resumed")
    assert_equal(found["DeepSpeed"])
    assert_equal(found["DeepSpeed resumed"])


@pytest.fixture
def alone() -> Iterator[None]:
    """This process in a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_lora(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def with_prompt(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def with_head(model: Any) -> Any:
    model.lm_head.weight.requires_grad_(True)
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "head": with_head,
    "LoRA": with_lora,
    "prompt tuning": with_prompt,
    "compiled": lambda model: torch.compile(with_lora(model)),  # type: ignore[return-value]
    "own module": lambda model: nn.Sequential(with_lora(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ghosts_are_left_out(wrapper: str, llamas: Both, alone: None) -> None:
    """Whatever is around the model, and so in their names."""
    model = WRAPPERS[wrapper](llamas.remote())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["mine"])
    assert "mine" in DistributedDataParallel(model).parameters_to_ignore


def test_fully_sharded(llamas: Both, alone: None) -> None:
    with pytest.raises(RemoteWeightError, match="DistributedDataParallel"):
        fully_shard(with_lora(llamas.remote()), mesh=init_device_mesh("cpu", (1,)))


def test_peer_tune(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of it would write into one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in command("tune", "model=m", "initial_peers=[p]", "data.path=d", "output=o").refusal()
