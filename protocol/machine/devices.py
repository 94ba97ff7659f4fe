"""The devices that torch can compute on here: CUDA's (AMD's ROCm has the same name), Intel's, Apple's, and the CPU."""

import logging

import torch

from protocol.errors import BadUsage, first_line

logger = logging.getLogger(__name__)

_KINDS = ("cuda", "xpu", "mps")
_SIDE = 16
_FAILURES = (RuntimeError, AssertionError, TypeError)
"""What torch raises: of drivers and kernels, of a build without a kind of device, of a dtype that there is not."""


def choose_device(name: str) -> torch.device:
    """The device to compute on, tried out: `name` is torch's name of one, or "auto", the first that works.

    "auto" goes through the cards in torch's order (of CUDA's, the fastest first) and warns of each that does not work;
    those after the first that works are left alone, as even to try one takes some of its memory for good. Raises
    `BadUsage` for a device that is not there or does not work.
    """
    if name != "auto":
        return _named(name)
    for device in devices():
        try:
            return _try(device)
        except _FAILURES as error:
            logger.warning("%s is not used: %s", describe(device), _reason(error))
    if not devices() and (kind := _built_for()):
        try:
            return _try(torch.device(kind))
        except _FAILURES as error:
            logger.warning("computing on the CPU, as there is no %s device: %s", kind, _reason(error))
    return torch.device("cpu")


def devices() -> list[torch.device]:
    """The cards that torch sees here, whether they work or not; the CPU is not among them."""
    return [torch.device(kind, number) for kind in _KINDS for number in range(getattr(torch, kind).device_count())]


def describe(device: torch.device) -> str:
    """A device as people know it: "cuda:0 (NVIDIA GeForce RTX 3060)"."""
    try:
        return f"{device} ({torch.get_device_module(device).get_device_name(device)})"
    except (*_FAILURES, AttributeError):  # Apple's and the CPU have no name
        return str(device)


def make_current(device: torch.device) -> None:
    """This thread's calls that name no device are for this one: pinning memory would take some of the first card's."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def suitable_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float16 in the place of bfloat16 where a device does not compute in that, or only emulates it."""
    return torch.float16 if dtype == torch.bfloat16 and not _computes_in_bfloat16(device) else dtype


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # NVIDIA's since Ampere; all of AMD's that ROCm knows
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_bfloat16_conversions)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def _named(name: str) -> torch.device:
    try:
        return _try(torch.device(name))
    except _FAILURES as error:
        there = ", ".join(map(describe, [*devices(), torch.device("cpu")]))
        raise BadUsage(
            f"The device {name!r} cannot be used: {_reason(error)}; torch sees {there} on this machine, and "
            "docs/hardware.md says how to install it for which device."
        ) from error


def _try(device: torch.device) -> torch.device:
    """Where a small product was computed, its number included. Raises one of `_FAILURES`."""
    for dtype in (torch.float32, suitable_dtype(torch.bfloat16, device)):
        ones = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
        if (ones @ ones).sum().item() != _SIDE**3:
            raise RuntimeError("it computes wrong numbers")
    return ones.device


def _built_for() -> str | None:
    """The kind of cards that this build of torch is for, where there may be none."""
    if torch.version.cuda or torch.version.hip:
        return "cuda"
    return "xpu" if torch.version.xpu else None


def _reason(error: BaseException) -> str:
    if "no kernel image" in str(error):
        return "this build of torch has no kernels for its architecture"
    if isinstance(error, torch.OutOfMemoryError):
        return "it has no memory free"
    return first_line(error)[:150]
