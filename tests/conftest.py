"""Fixtures: small models, real peers."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers.utils import logging as transformers_logging

from peer.span.loading import load_span
from peer.span.span import Span
from protocol.model.checkpoint import open_checkpoint
from tests.tools.arena import Arena
from tests.tools.command import Command
from tests.tools.families import build_family
from tests.tools.spans import END, START
from tests.tools.swarm import ForkServer, Swarm, new_swarm
from tests.tools.wire import Wire, open_wire
from tests.tools.words import save_tokenizer

torch.set_num_threads(1)  # as the peers: with equal kernels the difference is 0.0
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> the folder of a small random model."""
    root = tmp_path_factory.getbasetemp() / "models"
    return lambda name: build_family(name, root)


@pytest.fixture(scope="session")
def llama(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small llama with a tokenizer."""
    folder = shutil.copytree(models("llama"), tmp_path_factory.mktemp("spoken") / "llama")
    save_tokenizer(folder, 128)
    return folder


@pytest.fixture(scope="module")
def spans(models: Callable[[str], Path]) -> Callable[..., Span]:
    """Family name, options of `load_span` -> the blocks [START, END) of that model, loaded once for a module."""
    return functools.cache(
        lambda family, **options: load_span(open_checkpoint(str(models(family))), START, END, **options)
    )


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def swarm(fork_server: ForkServer) -> Iterator[Swarm]:
    """A swarm for one test."""
    with new_swarm(fork_server) as made:
        yield made


@pytest.fixture(scope="module")
def llama_swarm(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[tuple[Path, Swarm]]:
    """The small llama over three peers, for the tests of one module."""
    with new_swarm(fork_server) as made:
        made.serve(models("llama"), "0:2", "2:3", "3:5")
        yield models("llama"), made


@pytest.fixture(scope="module")
def arena(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[Arena]:
    """For the tests of one module that kill peers."""
    with new_swarm(fork_server) as swarm:
        _, *parts = swarm.serve(models("llama"), "0:2", "2:4", "4:5")
        yield Arena(models("llama"), swarm, parts)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the `peer` command."""
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def opened_wire(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[Wire]:
    """A peer for the tests of one module that talk to it below the client."""
    with open_wire(fork_server, models("llama")) as wire:
        yield wire


@pytest.fixture(params=["libp2p", "direct"])
def wire(opened_wire: Wire, request: pytest.FixtureRequest) -> Iterator[Wire]:
    """That peer, by either carrier; after every test it still serves."""
    opened_wire.carrier = request.param
    with opened_wire.still_serves():
        yield opened_wire
