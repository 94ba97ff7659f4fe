"""How much of a device's memory a peer finds, and how much of it it takes."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from peer.start.memory import DeviceMemory
from peer.start.options import ServeOptions

CARD = torch.device("xpu:0")


def limited(free: int, total: int, held: int, memory: str | None) -> int:
    return DeviceMemory(free, total, held).within(ServeOptions(memory=memory).memory_limit)


def test_without_a_limit_a_peer_takes_what_is_free() -> None:
    assert limited(7, 10, 1, None) == 7


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("50%", 4 * 10**9), ("12.5%", 250 * 10**6), ("6 GB", 5 * 10**9), ("20", 7 * 10**9), ("1", 0)],
)
def test_a_limit_counts_what_the_process_holds_already(memory: str, expected: int) -> None:
    assert limited(7 * 10**9, 10 * 10**9, 10**9, memory) == expected


def test_peers_on_one_device_have_equal_parts_of_it() -> None:
    peers = ServeOptions(device="cuda:0, cuda:1,cuda:0", blocks="0:2,2:4,4:6").for_each_device()
    assert [(peer.device, peer.blocks, peer.memory) for peer in peers] == [
        ("cuda:0", "0:2", "48.0%"), ("cuda:1", "2:4", None), ("cuda:0", "4:6", "48.0%"),
    ]  # fmt: skip
    parts = [limited(10**10, 10**10, 0, peer.memory) for peer in peers if peer.device == "cuda:0"]
    assert sum(parts) == 0.96 * 10**10
    assert {peer.memory for peer in ServeOptions(device="cpu,cpu", memory="3").for_each_device()} == {"3"}


def test_what_others_hold_of_a_card_is_said() -> None:
    memory = DeviceMemory(free=5 * 10**9, total=12 * 10**9, held=10**9)
    said = "other programs hold 6.00 of the 12.00 GB of cuda:0; should they take more, calls of this peer will fail"
    assert memory.others(torch.device("cuda:0")).startswith(said)
    assert not memory.others(torch.device("cpu")), "a machine has many programs"
    assert not DeviceMemory(free=10 * 10**9, total=12 * 10**9, held=10**9).others(torch.device("cuda:0"))


def test_an_intel_card_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device: (3, 8))
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device: 2)
    assert DeviceMemory.of(CARD) == DeviceMemory(free=3, total=8, held=2)


@pytest.mark.parametrize(("available", "free"), [(100, 8), (5, 5)])
def test_apples_gpu_has_the_hosts_memory_as_far_as_metal_gives_it(
    available: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=200))
    assert DeviceMemory.of(torch.device("mps:0")) == DeviceMemory(free=free, total=10, held=2)


def test_the_cpu_has_the_hosts() -> None:
    memory = DeviceMemory.of(torch.device("cpu"))
    assert 0 < memory.held < memory.total
    assert 0 < memory.free < memory.total
