"""Several threads of one process make models at once."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from protocol.model.checkpoint import open_checkpoint
from protocol.model.loading import load_part

INITIALISERS = ("normal_", "zeros_", "kaiming_uniform_", "trunc_normal_")


def replaced() -> list[object]:
    """What Transformers replaces while it makes a model."""
    return [
        *(getattr(torch.nn.init, name) for name in INITIALISERS), torch.get_default_dtype(),
        PreTrainedModel.tie_weights, PreTrainedModel.init_weights,
    ]  # fmt: skip


@pytest.fixture
def before() -> Iterator[list[object]]:
    found = replaced()
    yield found
    for name, initialiser in zip(INITIALISERS, found, strict=False):
        setattr(torch.nn.init, name, initialiser)
    torch.set_default_dtype(torch.float32)
    *_, PreTrainedModel.tie_weights, PreTrainedModel.init_weights = found


class _Meeting:
    """Where the first of two threads waits for the second, and that for the end of the first: once, if they may."""

    def __init__(self) -> None:
        self._arrived, self._first_is_done = threading.Event(), threading.Event()
        self._been = set[str]()

    def wait(self) -> None:
        name = threading.current_thread().name
        if name in self._been:
            return
        self._been.add(name)
        if name == "first":
            self._arrived.wait(0.5)
        else:
            self._arrived.set()
            self._first_is_done.wait(0.5)

    def of_two(self, work: Callable[[], object]) -> None:
        def first() -> None:
            work()
            self._first_is_done.set()

        threads = [threading.Thread(target=first, name="first"), threading.Thread(target=work, name="second")]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("where", ["construction", "initialisation"])
def test_two_parts_loaded_at_once_leave_pytorch_as_it_was(
    where: str, models: Callable[[str], Path], before: list[object]
) -> None:
    checkpoint, meeting = open_checkpoint(str(models("llama"))), _Meeting()

    class Slow(LlamaForCausalLM):
        def _init_weights(self, module: torch.nn.Module) -> None:
            if where == "initialisation":
                meeting.wait()

    def cut(model: PreTrainedModel) -> None:
        if where == "construction":
            meeting.wait()

    meeting.of_two(
        lambda: load_part(Slow, checkpoint.config, checkpoint.state_dict(lambda _: False), cut, dtype=torch.bfloat16)
    )
    assert replaced() == before
