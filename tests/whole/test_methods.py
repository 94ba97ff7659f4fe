"""Every method x family x task over real peers equals plain local PEFT: three steps, saved and loaded both ways."""

from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch

from tests.tools.methods import METHODS, ROUNDED, ROUNDING, TARGETS, TASKS, adapted, load, logits, refusal_of, train
from tests.tools.swarm import ForkServer, Swarm, new_swarm


@pytest.fixture(scope="module", params=list(TARGETS))
def served(
    request: pytest.FixtureRequest, fork_server: ForkServer, models: Callable[[str], Path]
) -> Iterator[tuple[str, Path, Swarm]]:
    path = models(request.param)
    with new_swarm(fork_server) as swarm:
        swarm.serve(path, "0:2", "2:5")
        yield request.param, path, swarm


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_equals_local(served: tuple[str, Path, Swarm], task: str, method: str, tmp_path: Path) -> None:
    family, path, swarm = served
    config = METHODS[method](family, task)
    if (refusal := refusal_of(family, task, method)) is not None:
        with pytest.raises(refusal.errors):
            train(adapted(load(path, task, None), config), task, method)
        return
    local = adapted(load(path, task, None), config)
    remote = adapted(load(path, task, swarm.initial_peers), config)
    ours, theirs = train(remote, task, method), train(local, task, method)
    assert len(ours) == len(theirs) > 6
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=ROUNDING if method in ROUNDED else 0)
    remote.save_pretrained(tmp_path / "remote")
    local.save_pretrained(tmp_path / "local")
    plain = peft.PeftModel.from_pretrained(load(path, task, None), tmp_path / "remote").eval()
    again = peft.PeftModel.from_pretrained(load(path, task, swarm.initial_peers), tmp_path / "local").eval()
    expected = logits(local, task)
    torch.testing.assert_close(logits(plain, task), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(logits(again, task), expected, rtol=0, atol=ROUNDING)
