"""Tensors between a GPU and this machine's memory."""

from typing import Any

import pytest
import torch

from protocol.machine.transfer import to_devices, to_host

LARGE = 2**19
"""Elements of a tensor that does not go through pinned memory."""


def tensors(device: torch.device) -> list[torch.Tensor]:
    there = [torch.arange(LARGE), torch.randn(3, 4).mT, torch.ones(2, dtype=torch.bool), torch.empty(0, 3)]
    return [*(tensor.to(device) for tensor in there), torch.randn(5)]


@pytest.mark.parametrize("pins", [True, False])
def test_there_and_back(pins: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory cannot be pinned, as on WSL2."""
    empty = torch.empty

    def without_pins(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    given = tensors(device)
    if not pins:
        monkeypatch.setattr(torch, "empty", without_pins)
    copies = to_host(given)
    assert {copy.device.type for copy in copies} == {"cpu"}
    assert copies[-1] is given[-1]
    devices = [tensor.device for tensor in given]
    back = to_devices(copies, devices)
    assert [tensor.device for tensor in back] == devices
    for tensor, other in zip(given, back, strict=True):
        assert torch.equal(tensor, other)


def test_one_wait_for_all(device: torch.device, pretended: Any) -> None:
    given = tensors(device)
    pretended.reset()
    copies = to_host(given)
    assert pretended.waits() == {"stream.synchronize": 1}
    to_devices(copies, [device] * len(copies))
    assert pretended.waits() == {"stream.synchronize": 2}
    pretended.reset()
    to_host(copies)
    assert pretended.waits() == {}
