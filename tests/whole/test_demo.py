"""`peer demo`: what it may replace, and what it leaves behind when it is stopped."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import transformers
from rich.console import Console

from client.tune.description.config import TuneConfig
from client.tune.errors import Interrupted
from client.tune.running.trainer import TuneTrainer
from peer.commands import demo
from tests.tools.command import Command
from tests.tools.swarm import ForkServer, wait_for_line


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of an earlier demo."""
    output = tmp_path / "earlier"
    (output / "adapter").mkdir(parents=True)
    config = TuneConfig.model_validate(demo._description("m/other", 7, Path("elsewhere")))
    (output / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "data": "abc"}))
    return output


_WAITS = """
import time
from peer.commands.demo import _processes
with _processes() as start:
    peer = start("bootstrap")
    print(peer.pid, start._logs, flush=True)
    start.address_of(peer)
    print("started", flush=True)
    time.sleep(60)
"""


class _StartedError(Exception):
    """The demo has got as far as its processes."""


@pytest.fixture
def stops_before_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise _StartedError

    monkeypatch.setattr(demo, "_processes", stop)


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# The output folder


@pytest.mark.parametrize("record", [None, "no JSON", "[]", '{"config": {"model": "m"}}'])
def test_a_folder_that_is_no_demos_is_left_alone(
    command: Command, llama: Path, tmp_path: Path, record: str | None
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "thesis.txt").write_text("x")
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    before = content(tmp_path)
    said = command("demo", "--model", llama, "--output", tmp_path).refusal()
    assert "not from an earlier demo; name another folder" in said
    assert content(tmp_path) == before


def test_a_run_of_the_users_on_the_same_data_is_left_alone(command: Command, llama: Path, earlier: Path) -> None:
    record = json.loads((earlier / "run.json").read_text())
    record["config"]["initial_peers"] = ["/ip4/192.0.2.1/tcp/1/p2p/Qm"]
    (earlier / "run.json").write_text(json.dumps(record))
    assert "not from an earlier demo" in command("demo", "--model", llama, "--output", earlier).refusal()
    assert content(earlier) == {"adapter", "run.json"}


def test_what_somebody_put_into_a_demos_folder_is_left_alone(command: Command, llama: Path, earlier: Path) -> None:
    (earlier / "thesis.txt").write_text("x")
    assert "holds 'thesis.txt', which no demo wrote" in command("demo", "--model", llama, "--output", earlier).refusal()
    assert content(earlier) == {"adapter", "run.json", "thesis.txt"}


def test_an_earlier_demo_stays_until_its_model_is_open(command: Command, tmp_path: Path, earlier: Path) -> None:
    assert "has no config.json" in command("demo", "--model", tmp_path / "nope", "--output", earlier).refusal()
    assert content(earlier) == {"adapter", "run.json"}


@pytest.mark.usefixtures("stops_before_processes")
def test_an_earlier_demo_is_replaced(llama: Path, earlier: Path) -> None:
    with pytest.raises(_StartedError):
        demo.run_demo(str(llama), 1, earlier)
    assert content(earlier) == set()


@pytest.mark.usefixtures("stops_before_processes")
@pytest.mark.parametrize("inside", ["", "folder"])
def test_an_output_that_cannot_be_a_folder(command: Command, llama: Path, tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("x")
    said = command("demo", "--model", llama, "--output", tmp_path / "file" / inside).refusal()
    assert "--output must be a folder that can be written to" in said


# Being stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_demo_leaves_nothing(number: int, fork_server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(_WAITS)
    stdout = tmp_path / "out"
    stopped = psutil.Process(fork_server.start([], stdout, tmp_path / "err", script=tmp_path / "waits.py"))
    family: list[psutil.Process] = []
    try:
        pid, logs = wait_for_line(stdout, 0).split()
        family.append(psutil.Process(int(pid)))
        assert wait_for_line(stdout, 1) == "started"
        family += family[0].children()
        stopped.send_signal(number)
        assert psutil.wait_procs([stopped], 10)[1] == []
        assert psutil.wait_procs(family, 2)[1] == []
        assert not Path(logs).exists()
    finally:
        for left in (stopped, *family):
            if left.is_running():
                left.kill()


def test_a_demo_stopped_in_its_training_says_how_to_begin_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TuneTrainer, "training_step", interrupt)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    with pytest.raises(Interrupted, match="the same command begins the demo anew"):
        demo._tune(str(llama), model, tokenizer, 2, tmp_path / "out", Console(quiet=True))
    demo._check_output(tmp_path / "out")
