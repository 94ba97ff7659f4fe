"""Choosing a GPU, the dtype for it, and what of its memory is free."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peer.span.loading import load_span
from peer.span.span import Inputs, Mode
from peer.start.assembly import _load_span
from peer.start.memory import DeviceMemory
from peer.start.options import ServeOptions
from protocol.errors import BadUsage
from protocol.machine.devices import choose_device, describe, make_current
from protocol.model.checkpoint import open_checkpoint
from tests.tools.families import build_llama


def test_a_gpu_can_be_named_with_and_without_its_number(device: torch.device) -> None:
    assert choose_device(str(device)) == device
    assert choose_device("cuda") == device
    assert describe(device).startswith("cuda:0 (")


def test_a_gpu_without_memory_is_refused(pretended: Any, device: torch.device) -> None:
    pretended.limit(0)
    with pytest.raises(BadUsage, match="The device 'cuda:0' cannot be used: it has no memory free; torch sees cpu on"):
        choose_device(str(device))


def test_calls_that_name_no_device_go_to_the_peers_own(pretended: Any) -> None:
    make_current(torch.device("cuda:1"))
    try:
        assert torch.cuda.current_device() == 1
        assert torch.ones(1, device="cuda").device == torch.device("cuda:1")
    finally:
        make_current(torch.device("cuda:0"))


def _small_llama(folder: Path) -> Path:
    return build_llama(
        folder, name="half", hidden=32, layers=2, heads=4, intermediate=64, vocab=64, dtype=torch.bfloat16
    )


def test_before_ampere_bfloat16_is_served_in_float16(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(_small_llama(tmp_path)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: (7, 5))
    span = load_span(checkpoint, 0, 2, device=str(device))
    assert span.dtype == torch.float16
    assert {parameter.dtype for parameter in span.model.parameters()} == {torch.float16}
    hidden = torch.randn(1, 5, span.hidden_size, dtype=torch.float16)
    found = span.run(Inputs(hidden.to(device)), Mode(span.blocks))
    expected = load_span(checkpoint, 0, 2, dtype=torch.float16).run(Inputs(hidden), Mode(span.blocks))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=1e-2)  # attention has other kernels there
    asked = load_span(checkpoint, 0, 2, dtype=torch.bfloat16, device=str(device))
    assert asked.dtype == torch.bfloat16, "who names a dtype gets it"


def test_auto_says_which_cards_it_leaves_alone(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level("INFO", "peer"):
        span = _load_span(ServeOptions(), open_checkpoint(str(_small_llama(tmp_path))), range(2))
    assert span.device == device
    name = describe(device).partition(" ")[2]
    assert f"computing on cuda:0 {name} in bfloat16" in caplog.messages
    assert f"left alone: cuda:1 {name}; with --device cuda:0,cuda:1 each has a peer" in caplog.messages


def test_a_second_peer_of_a_gpu_keeps_to_its_part(pretended: Any, device: torch.device) -> None:
    limit = ServeOptions(memory="50%").memory_limit
    own = torch.empty(100_000, dtype=torch.uint8, device=device)
    held = pretended.bytes_now()
    assert held >= own.nbytes
    pretended.limit(3 * held)
    memory = DeviceMemory.of(device)
    assert memory == DeviceMemory(free=2 * held, total=3 * held, held=held)
    assert memory.within(None) == 2 * held
    assert memory.within(limit) == 3 * held // 2 - held
