"""A run that was stopped, by whatever, goes on as if it had not been: same losses to the last bit, same adapter."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from client.tune.description.config import TuneConfig
from client.tune.errors import ConfigError, DataError, DivergedError, Interrupted, OutputError
from client.tune.running import checkpoints, state, trainer
from client.tune.running import run as run_module
from client.tune.running.output import replace_file, writing
from client.tune.running.run import TuneRun, check_output
from tests.tools.tune import ALPACA, describe, losses, silent, start, write_jsonl

Arm = Callable[[TuneRun], None]


def on_forward(count: int, action: Callable[[], None]) -> Arm:
    """Does something at the `count`-th training forward: in the middle of a step."""

    def arm(run: TuneRun) -> None:
        seen = iter(range(1, 1000))

        def hook(module: torch.nn.Module, *_: Any) -> None:
            if module.training and next(seen) == count:
                action()

        run.model.get_base_model().model.layers[1].register_forward_pre_hook(hook)

    return arm


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ConnectionError("no peer serves blocks 1:2")


def killed(config: TuneConfig, arm: Arm) -> None:
    """Runs in a process of its own, which must die by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            run = start(config, resume=True)
            arm(run)
            run.train(silent())
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def adapter(config: TuneConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output / "adapter" / "adapter_model.safetensors")


def assert_same(config: TuneConfig, whole: TuneConfig) -> None:
    assert losses(config) == losses(whole)
    one, other = adapter(config), adapter(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_drawn() -> Iterator[None]:
    """Spares these many runs their plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "plot_losses", lambda lines: b"drawn")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    """A run that nothing interrupted: 8 steps over 2 and a half passes, validated in between."""
    config = describe(tmp_path_factory.mktemp("whole"), **SECTIONS)
    start(config).train(silent())
    return config


SECTIONS: dict[str, Any] = {"data": {"validation": 0.2}, "trainer": {"eval_every": 2}}


@pytest.fixture
def config(tmp_path: Path) -> TuneConfig:
    return describe(tmp_path, **SECTIONS)


def interrupted(config: TuneConfig, arm: Arm, resume: bool = False) -> str:
    run = start(config, resume=resume)
    arm(run)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run.train(silent())
    assert signal.getsignal(signal.SIGINT) is before
    return str(caught.value)


def test_ctrl_c_in_the_middle_of_a_step(config: TuneConfig, whole: TuneConfig) -> None:
    said = interrupted(config, on_forward(10, interrupt))  # 2 of a step, 2, 1 (end of the pass), 2, 2, and here
    folder = config.output / "checkpoints" / "checkpoint-5"
    assert said == f"stopped after step 5 of 8, which is saved in {folder}; go on with the same command and --resume"
    assert max(losses(config)) == 5
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_ctrl_c_twice_and_at_the_very_next_step(config: TuneConfig, whole: TuneConfig) -> None:
    interrupted(config, on_forward(4, interrupt))
    assert "after step 1 of 8" in interrupted(
        config, on_forward(1, interrupt), resume=True
    )  # nothing new: kept as it is
    interrupted(config, on_forward(3, interrupt), resume=True)
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_ctrl_c_within_the_optimizer_waits_for_the_step_to_be_whole(config: TuneConfig, whole: TuneConfig) -> None:
    steps = iter(range(1, 100))
    handle = register_optimizer_step_post_hook(lambda *_: interrupt() if next(steps) == 4 else None)
    try:
        said = interrupted(config, lambda run: None)
    finally:
        handle.remove()
    assert "after step 4 of 8" in said
    assert max(losses(config)) == 4
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_ctrl_c_while_a_checkpoint_is_written(
    config: TuneConfig, whole: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: torch.nn.Module, folder: Path) -> None:
        interrupt()
        state.save_trained(model, folder)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_trained", save)
        assert "after step 3 of 8" in interrupted(config, lambda run: None)
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_ctrl_c_before_the_first_step(config: TuneConfig, whole: TuneConfig) -> None:
    said = interrupted(config, on_forward(1, interrupt))
    assert said == "stopped before the first step of 8 was done; begin again with the same command and --resume"
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_an_interrupt_that_is_no_signal(config: TuneConfig, whole: TuneConfig) -> None:
    """The network's thread or a debugger may raise it anywhere; not only the signal handler here."""

    def stop() -> None:
        raise KeyboardInterrupt

    interrupted(config, on_forward(7, stop))
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_any_other_failure_keeps_the_work_and_says_what_it_was(config: TuneConfig, whole: TuneConfig) -> None:
    run = start(config)
    on_forward(9, fail)(run)
    with pytest.raises(ConnectionError, match=r"no peer serves"):
        run.train(silent())
    assert run._store.newest() is not None
    assert run._store.newest()[0] == 4  # type: ignore[index]
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_kill_9_in_the_middle_of_a_step(config: TuneConfig, whole: TuneConfig) -> None:
    killed(config, on_forward(10, kill))
    assert max(losses(config)) == 5  # logged, but after the checkpoint of step 3: they come again
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_kill_9_while_a_checkpoint_is_written(
    config: TuneConfig, whole: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: torch.nn.Module, folder: Path) -> None:
        state.save_trained(model, folder)
        if ".checkpoint-6" in folder.name:
            kill()

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_trained", save)
        killed(config, lambda run: None)
    run = start(config, resume=True)
    assert run.first_step == 3
    run.train(silent())
    assert_same(config, whole)
    assert not list((config.output / "checkpoints").glob(".*"))


CASES: dict[str, dict[str, Any]] = {
    "adalora": {"adapter": {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}},
    "ptuning": {"adapter": {"method": "ptuning", "encoder_hidden_size": 16, "num_virtual_tokens": 4}},
    "prefix": {"adapter": {"method": "prefix", "prefix_projection": True, "num_virtual_tokens": 4}},
    "vera": {"adapter": {"method": "vera", "r": 8, "vera_dropout": 0.2}},
    "head": {"adapter": {"method": "lora", "modules_to_save": ["lm_head"], "lora_dropout": 0.2}},
    "packed": {"data": {"packing": True, "max_length": 100}, "trainer": {"batch_size": 1}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_method_goes_on_exactly(tmp_path: Path, case: str) -> None:
    sections = CASES[case]
    config, whole = describe(tmp_path / "stopped", **sections), describe(tmp_path / "whole", **sections)
    start(whole).train(silent())
    interrupted(config, on_forward(11, interrupt))
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_adalora_prunes_on_the_way(tmp_path: Path) -> None:
    config = describe(tmp_path, **CASES["adalora"])
    run = start(config)
    run.train(silent())
    ranks = json.loads((config.output / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks
    assert sum(sum(kept) for kept in ranks.values()) == 2 * len(ranks)


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(config: TuneConfig, whole: TuneConfig) -> None:
    interrupted(config, on_forward(13, interrupt))
    newest = sorted((config.output / "checkpoints").iterdir())[-1]
    assert newest.name == "checkpoint-7"
    weights = newest / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    run = start(config, resume=True)
    assert run.first_step == 6
    run.train(silent())
    assert_same(config, whole)


def test_a_finished_run_resumed_writes_its_results_again(config: TuneConfig, whole: TuneConfig) -> None:
    first = start(config).train(silent())
    for name in ("adapter/adapter_model.safetensors", "samples.md", "loss.png"):
        (config.output / name).unlink()
    again = start(config, resume=True).train(silent())
    assert again == first
    assert_same(config, whole)
    assert (config.output / "samples.md").exists()
    assert (config.output / "loss.png").exists()


def test_more_steps_can_be_asked_of_a_finished_run(config: TuneConfig) -> None:
    start(config).train(silent())
    longer = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 10, "save_every": 1})})
    start(longer, resume=True).train(silent())
    assert list(losses(config)) == list(range(1, 11))
    assert (config.output / "checkpoints" / "checkpoint-9").is_dir()  # the new save_every holds


def test_fewer_steps_than_are_done_cannot_be_asked_for(config: TuneConfig) -> None:
    """Its adapter would be that of all the steps done; and what the folder says of itself stays true."""
    interrupted(config, on_forward(10, interrupt))
    record = (config.output / "run.json").read_text()
    shorter = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 4})})
    with pytest.raises(ConfigError) as caught:
        start(shorter, resume=True)
    assert str(caught.value) == (
        f"the run in {config.output} has done 5 steps and can't go back to 4; ask for at least 5 (trainer.steps or"
        " trainer.epochs), or name another output"
    )
    assert (config.output / "run.json").read_text() == record
    enough = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 5})})
    assert start(enough, resume=True).train(silent()).steps == 5


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("trainer", {"learning_rate": 0.5}, "trainer.learning_rate was 0.01 when the run in"),
        ("adapter", {"r": 2}, "adapter.r was 4 when the run in"),
        ("data", {"train_on": "all"}, "the training data is not what it was when the run in"),
    ],
)
def test_another_run_is_not_resumed(config: TuneConfig, section: str, change: dict[str, Any], expected: str) -> None:
    start(config).begin()
    changed = getattr(config, section).model_copy(update=change)
    with pytest.raises(ConfigError) as caught:
        start(config.model_copy(update={section: changed}), resume=True)
    assert str(caught.value).startswith(expected)


def test_what_makes_the_data_another_is_named(config: TuneConfig) -> None:
    """So that flags that were given at the start, and not with --resume, are found."""
    start(config).begin()
    changed = config.model_copy(update={"data": config.data.model_copy(update={"train_on": "all", "max_length": 128})})
    with pytest.raises(ConfigError, match=r"restore it \(data.max_length was None, data.train_on was 'answers'\)$"):
        start(changed, resume=True)


def test_a_run_is_not_begun_over_another(config: TuneConfig) -> None:
    start(config).begin()
    for attempt in (lambda: start(config), lambda: check_output(config, resume=False)):
        with pytest.raises(OutputError, match=r"holds a run \(run.json\); go on with it \(--resume\) or name another"):
            attempt()
    check_output(config, resume=True)


def test_an_output_that_cannot_be_written(config: TuneConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"output": tmp_path / "file" / "out"})
    with pytest.raises(OutputError, match=r"can't write files to .*: Not a directory"):
        check_output(blocked, resume=False)


def test_a_place_without_free_bytes_is_not_called_full_for_another_reason(config: TuneConfig) -> None:
    with pytest.raises(OutputError, match=r"can't write files to /proc/out: No such file or directory"):
        check_output(config.model_copy(update={"output": Path("/proc/out")}), resume=False)


# ---- a disk that is full


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets no file grow over so many bytes: writes fail as on a full disk, wherever they come from."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_that_does_not_fit(
    config: TuneConfig, whole: TuneConfig, small_files: Callable[[int], None]
) -> None:
    run = start(config)
    on_forward(9, lambda: small_files(6000))(run)
    with pytest.raises(OutputError) as caught:
        run.train(silent())
    small_files(resource.RLIM_INFINITY)
    assert str(caught.value).startswith(f"can't write checkpoint-6 to {config.output / 'checkpoints'}: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["checkpoint-3"]
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_a_full_disk_is_called_so(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: torch.nn.Module, folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(trainer, "save_trained", full)
    with pytest.raises(OutputError, match=r"checkpoint-3 to .*: no space is left there; free some"):
        start(config).train(silent())
    assert list((config.output / "checkpoints").iterdir()) == []


def test_a_full_disk_is_called_so_where_torch_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"can't write it to .*: no space is left there"), writing("it", tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def test_what_was_good_stays_when_its_successor_cannot_be_written(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    path = tmp_path / "loss.png"
    replace_file(path, b"good")
    small_files(10)
    with pytest.raises(OutputError, match=r"can't write loss.png to"):
        replace_file(path, b"much too long")
    store = checkpoints.CheckpointStore(tmp_path / "checkpoints", keep=1)
    with pytest.raises(OutputError), store.writing(1) as part:
        (part / "weights").write_bytes(b"much too long")
    small_files(resource.RLIM_INFINITY)  # pytest writes its own result before the fixture ends, maybe into a file
    assert path.read_bytes() == b"good"
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["checkpoints", "loss.png"]


def test_a_log_cut_short_by_a_kill_is_mended(config: TuneConfig, whole: TuneConfig) -> None:
    interrupted(config, on_forward(10, interrupt))
    with (config.output / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    start(config, resume=True).train(silent())
    assert_same(config, whole)


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(config: TuneConfig) -> None:
    run = start(config)

    def spoil() -> None:
        with torch.no_grad():
            run.model.get_base_model().lm_head.weight.fill_(float("nan"))

    on_forward(8, spoil)(run)
    with pytest.raises(DivergedError, match=r"the loss became nan at step 5; lower trainer.learning_rate"):
        run.train(silent())
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert max(losses(config)) == 4


def test_data_that_changed_to_nothing(config: TuneConfig) -> None:
    write_jsonl(config.data.path[0], ALPACA[:1])
    with pytest.raises(DataError, match=r"0.2 of 1 records leaves none to train on"):
        start(config)
