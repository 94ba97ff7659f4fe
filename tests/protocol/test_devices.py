"""Choosing a device: what is tried, what is left out, what a user is told."""

from collections.abc import Callable

import pytest
import torch

from protocol.errors import BadUsage
from protocol.machine import devices
from protocol.machine.devices import choose_device, suitable_dtype

Cards = Callable[..., list[torch.device]]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    """Pretends cards: what each raises when it is tried (`None`: it works). Returns the list of those tried so far."""

    def pretend(**failures: BaseException | None) -> list[torch.device]:
        tried: list[torch.device] = []
        there = [torch.device(name.replace("_", ":")) for name in failures]

        def try_one(device: torch.device) -> torch.device:
            tried.append(device)
            failure = failures[str(device).replace(":", "_")]
            if failure is not None:
                raise failure
            return device

        monkeypatch.setattr(devices, "devices", lambda: there)
        monkeypatch.setattr(devices, "_try", try_one)
        return tried

    return pretend


def test_auto_takes_the_first_card_that_works_and_leaves_the_next_alone(cards: Cards) -> None:
    tried = cards(cuda_0=None, cuda_1=None)
    assert choose_device("auto") == torch.device("cuda:0")
    assert tried == [torch.device("cuda:0")]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nCompile"),
            "this build of torch has no kernels for its architecture",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "it has no memory free"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), "(found version 11040)"),
    ],
)
def test_a_card_that_does_not_work_is_left_out_with_a_reason(
    failure: Exception, reason: str, cards: Cards, caplog: pytest.LogCaptureFixture
) -> None:
    cards(cuda_0=failure, cuda_1=None)
    assert choose_device("auto") == torch.device("cuda:1")
    (line,) = caplog.messages
    assert line.startswith("cuda:0")
    assert line.endswith(reason)


def test_without_a_card_that_works_it_is_the_cpu(cards: Cards) -> None:
    cards(xpu_0=RuntimeError("level zero"))
    assert choose_device("auto") == torch.device("cpu")


def test_a_build_for_cards_that_sees_none_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "devices", list)
    assert choose_device("auto") == torch.device("cpu")
    assert caplog.messages == [
        "computing on the CPU, as there is no cuda device: Torch not compiled with CUDA enabled",
    ]


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_can_be_named(name: str) -> None:
    assert choose_device(name).type == "cpu"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("xpu:7", "XPU"), ("gpu", "Expected one of cpu, cuda"), ("meta", "meta"), ("", "Device string")],
)
def test_a_device_that_is_not_there_is_refused_in_a_sentence_that_says_what_is(name: str, reason: str) -> None:
    with pytest.raises(BadUsage, match=f"The device '{name}' cannot be used: .*{reason}.*; torch sees .*cpu on this"):
        choose_device(name)


def test_bfloat16_becomes_float16_before_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    turing, ampere = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == turing else (8, 6))
    assert suitable_dtype(torch.bfloat16, turing) == torch.float16
    assert suitable_dtype(torch.float32, turing) == torch.float32
    assert suitable_dtype(torch.bfloat16, ampere) == torch.bfloat16
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's numbers are others: gfx803 has (8, 0), gfx1030 (10, 3)
    assert suitable_dtype(torch.bfloat16, turing) == torch.bfloat16


def test_bfloat16_on_intels_apples_and_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        has_bfloat16_conversions = False

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    assert suitable_dtype(torch.bfloat16, torch.device("xpu:0")) == torch.float16
    for is_new, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version, is_new=is_new: is_new)
        assert suitable_dtype(torch.bfloat16, torch.device("mps:0")) == expected
    assert suitable_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
