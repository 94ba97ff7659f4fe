"""Compiled steps give what others give, and are used only where they do and where it pays.

The graphs are real; PyTorch runs them as they are: to have C++ code made for them takes half a minute.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from peer.generation.joined import compiled
from peer.span.loading import load_span
from peer.span.span import Span
from peer.start import compile_trial
from peer.start.compile_trial import compile_steps
from protocol.model.checkpoint import open_checkpoint
from tests.tools.desk import Desk, play
from tests.tools.spans import END, START, assert_same

_BACKEND = "aot_eager"


@pytest.fixture
def load(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[str], Span]:
    caplog.set_level(logging.WARNING, "torch.__trace")  # thousands of records
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(compile_trial, "_PAYS", 0.0)
    return lambda family: load_span(open_checkpoint(str(models(family))), START, END)


def test_compiled_as_plain(load: Callable[[str], Span]) -> None:
    """All blocks of a type share their graphs: of one token, and of any number."""
    span = load("llama")
    packer = compile_steps(span, _BACKEND)
    assert packer
    assert counters["stats"]["unique_graphs"] == 2
    plain, desk = Desk(span), Desk(span, packer)
    assert_same(list(play(desk, desk.run, False)), list(play(plain, plain.each, False)))
    assert counters["stats"]["unique_graphs"] == 2


def test_no_such_compiler(load: Callable[[str], Span]) -> None:
    assert compile_steps(load("llama"), "no such backend") is None


def test_different_numbers(load: Callable[[str], Span], monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that does not compute the same is not used, however fast it is; nor what is no faster."""
    run = compiled.CompiledBlock.__call__
    monkeypatch.setattr(compiled.CompiledBlock, "__call__", lambda *args, **options: 1.001 * run(*args, **options))
    assert compile_steps(load("llama"), _BACKEND) is None
    monkeypatch.undo()
    monkeypatch.setattr(compile_trial, "_PAYS", 1e9)
    assert compile_steps(load("llama"), _BACKEND) is None
