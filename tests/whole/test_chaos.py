"""The short form of `benchmarks/chaos.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.chaos import STEPS, Clients, Report, run_chaos
from benchmarks.loads import Talk
from tests.tools.namespaces import Networks
from tests.tools.swarm import ForkServer

SECONDS = 20
SECONDS_PRIVATE = 6


def test_every_token_and_every_loss_survives(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    report = run_chaos(fork_server, models("llama"), SECONDS, seed=1, hard=False, length=24)
    assert not report.problems
    assert report.blows["killed"] > 2
    assert report.blows["started again"] > 2
    assert report.blows["stopped"] + report.blows["stopped with p2pd"] > 1
    assert report.tokens > 100
    assert report.losses >= STEPS


def test_also_on_machines_that_find_each_other_and_fetch_the_weights(
    fork_server: ForkServer, models: Callable[[str], Path], networks: Networks
) -> None:
    report = run_chaos(fork_server, models("llama"), SECONDS_PRIVATE, 1, hard=False, length=12, networks=networks)
    assert not report.problems
    assert report.blows["killed"] > 0
    assert report.tokens > 20
    assert report.losses >= STEPS


@pytest.mark.parametrize("differs", [False, True])
def test_what_differs_is_reported(differs: bool, tmp_path: Path) -> None:
    report = Report()
    clients = Clients(tmp_path, "", {}, report)
    said = torch.tensor([[3, 4, 5]])
    clients._compare_tokens(Talk("greedy", 1, 3), False, said, said + torch.tensor([0, 0, int(differs)]))
    clients._compare_losses(1, [2.0, 1.0], [2.0, 1.0 + 2e-5 * differs])
    assert (report.tokens, report.losses, len(report.problems)) == (3, 2, 2 * differs)
