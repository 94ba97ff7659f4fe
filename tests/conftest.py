"""Fixtures: small models, real peers. They import what they need when they are asked for, which the process that only
hands out tests to others never does."""

import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.tools.selection import is_quick, rank

if TYPE_CHECKING:
    from peer.span.span import Span
    from tests.tools.arena import Arena
    from tests.tools.command import Command
    from tests.tools.namespaces import Networks
    from tests.tools.swarm import Both, ForkServer, Swarm
    from tests.tools.wire import Wire


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_quick(item.nodeid):
            item.add_marker("quick")
    items.sort(key=lambda item: rank(item.nodeid))


def pytest_collection_finish() -> None:
    """What was imported is no garbage, and there is so much of it that to look through it takes a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def exact_and_quiet(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests compute as their peers do: with equal kernels the difference is 0.0. They are in no swarm of the user's."""
    import torch
    from transformers.utils import logging

    from protocol.name import HOME_VARIABLE

    os.environ[HOME_VARIABLE] = str(tmp_path_factory.getbasetemp() / "home")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Peers keep what they keep outside of the user's own cache, whose sample model is used all the same."""
    from protocol.name import CACHE_VARIABLE, cache_folder

    cache = tmp_path_factory.mktemp("cache")
    if (sample := cache_folder() / "SmolLM2-135M-Instruct").is_dir():
        (cache / sample.name).symlink_to(sample)
    os.environ[CACHE_VARIABLE] = str(cache)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> the folder of a small random model."""
    from tests.tools.families import build_family

    root = tmp_path_factory.getbasetemp() / "models"
    return lambda name: build_family(name, root)


@pytest.fixture(scope="session")
def llama(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small llama with a tokenizer."""
    from tests.tools.words import save_tokenizer

    folder = shutil.copytree(models("llama"), tmp_path_factory.mktemp("spoken") / "llama")
    save_tokenizer(folder, 128)
    return folder


@pytest.fixture(scope="module")
def spans(models: Callable[[str], Path]) -> "Callable[..., Span]":
    """Family name, options of `load_span` -> the blocks [START, END) of that model, loaded once for a module."""
    from peer.span.loading import load_span
    from protocol.model.checkpoint import open_checkpoint
    from tests.tools.spans import END, START

    return functools.cache(
        lambda family, **options: load_span(open_checkpoint(str(models(family))), START, END, **options)
    )


@pytest.fixture(scope="session")
def fork_server() -> "Iterator[ForkServer]":
    from tests.tools.swarm import ForkServer

    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def swarm(fork_server: "ForkServer") -> "Iterator[Swarm]":
    """A swarm for one test."""
    from tests.tools.swarm import new_swarm

    with new_swarm(fork_server) as made:
        yield made


@pytest.fixture(scope="session")
def llama_swarm(fork_server: "ForkServer", models: Callable[[str], Path]) -> "Iterator[tuple[Path, Swarm]]":
    """The small llama over three peers, which tests leave as they find them."""
    from tests.tools.swarm import new_swarm

    with new_swarm(fork_server) as made:
        made.serve(models("llama"), "0:2", "2:3", "3:5")
        yield models("llama"), made


@pytest.fixture(scope="module")
def llamas(llama_swarm: "tuple[Path, Swarm]") -> "Both":
    """The small llama, plain and through `llama_swarm`."""
    from tests.tools.swarm import Both

    return Both(*llama_swarm)


@pytest.fixture(scope="module")
def arena(fork_server: "ForkServer", models: Callable[[str], Path]) -> "Iterator[Arena]":
    """For the tests of one module that kill peers."""
    from tests.tools.arena import Arena
    from tests.tools.swarm import new_swarm

    with new_swarm(fork_server) as swarm:
        _, *parts = swarm.serve(models("llama"), "0:2", "2:4", "4:5")
        yield Arena(models("llama"), swarm, parts)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Command":
    """Runs the `peer` command."""
    from tests.tools.command import Command

    return Command(monkeypatch, capsys)


@pytest.fixture(scope="module")
def opened_wire(fork_server: "ForkServer", models: Callable[[str], Path]) -> "Iterator[Wire]":
    """A peer for the tests of one module that talk to it below the client."""
    from tests.tools.wire import open_wire

    with open_wire(fork_server, models("llama")) as wire:
        yield wire


@pytest.fixture(params=["libp2p", "direct"])
def wire(opened_wire: "Wire", request: pytest.FixtureRequest) -> "Iterator[Wire]":
    """That peer, by either carrier; after every test it still serves."""
    opened_wire.carrier = request.param
    with opened_wire.still_serves():
        yield opened_wire


@pytest.fixture
def networks() -> "Iterator[Networks]":
    """Hosts and networks for one test."""
    from tests.tools.namespaces import open_networks, why_not

    if reason := why_not():
        pytest.skip(reason)
    with open_networks() as made:
        yield made
