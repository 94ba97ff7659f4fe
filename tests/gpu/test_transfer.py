"""Tensors to the device and back: pinned where that can be had, and waited for once."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peer.span.span import Span
from peer.span.transfer import all_to_host, to_device, to_host
from peer.start import arena_trial
from peer.start.arena_trial import arena_for

WAIT = "stream.synchronize"


def no_locked_memory(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise RuntimeError("CUDA error: out of memory")


def test_a_small_tensor_is_not_waited_for_on_its_way_there(pretended: Any, device: torch.device) -> None:
    there = to_device(torch.arange(4.0), device, torch.float64)
    assert there.dtype == torch.float64
    assert not pretended.waits()
    assert torch.equal(to_host(there), torch.arange(4.0, dtype=torch.float64))
    assert pretended.waits() == {WAIT: 1}


def test_where_no_memory_can_be_pinned(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """As under WSL2, or where a user may lock none."""
    empty = torch.empty

    def unpinned(*args: Any, **options: Any) -> torch.Tensor:
        return (no_locked_memory if options.get("pin_memory") else empty)(*args, **options)

    monkeypatch.setattr(torch.Tensor, "pin_memory", no_locked_memory)
    monkeypatch.setattr(torch, "empty", unpinned)
    there = to_device(torch.arange(4.0), device)
    assert there.device == device
    assert torch.equal(to_host(there), torch.arange(4.0))


def test_many_tensors_take_one_copy_and_one_wait(pretended: Any, device: torch.device) -> None:
    chance = torch.Generator().manual_seed(0)
    given = {
        "odd": torch.randn(3, 5, generator=chance).to(torch.bfloat16),
        "nothing": torch.zeros(0, 4),
        "view": torch.randn(4, 6, generator=chance).T[1:],
        "single": torch.tensor(2.5),
        "numbers": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
    }
    there = {name: tensor.to(device) for name, tensor in given.items()}
    pretended.reset()
    back = all_to_host(there)
    assert pretended.waits() == {WAIT: 1}
    assert pretended.operations()["copy to the host"] == 1
    assert list(back) == list(given)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in given.items())


def test_one_too_large_to_be_pinned(pretended: Any, device: torch.device) -> None:
    large = torch.zeros(2**19, device=device)
    pretended.reset()
    assert torch.equal(all_to_host({"a": large, "b": large})["b"], torch.zeros(2**19))
    assert pretended.waits() == {WAIT: 1}


def test_rounding_of_keys_that_lie_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spans: Callable[..., Span], device: torch.device
) -> None:
    """A GPU's kernels are chosen by strides: what rounds as usual is no reason for another kind of cache."""
    caplog.set_level(logging.WARNING)
    span = spans("llama", device=str(device))
    monkeypatch.setattr(arena_trial, "_error", lambda *_: 1e-6)
    assert arena_for(span, 64)._stores
    assert not arena_for(spans("llama"), 64)._stores
    assert "not kept in an arena" in caplog.text
    caplog.clear()
    monkeypatch.setattr(arena_trial, "_error", lambda *_: 1e-3)
    assert not arena_for(span, 64)._stores
    assert "not kept in an arena" in caplog.text
