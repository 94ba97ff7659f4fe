"""Versions, the card, what it can do at best, what a copy costs, whether memory can be pinned."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.gpu import Gpu
from benchmarks.gpu.report import Figures, Report
from peer.span.transfer import to_device, to_host

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "hivemind", "triton")
_COPIES = {"8 KiB": 2**13, "28 KiB": 28 * 2**10, "1 MiB": 2**20, "16 MiB": 2**24}
"""A decoded token of a 7B and of a 176B model, a small prompt, a large one: bytes."""


def run(report: Report, gpu: Gpu, tiny: bool) -> None:
    """All of it, in a few seconds."""
    report.put("info", "versions", {"python": platform.python_version()} | dict(_versions()))
    report.attempt("info", "card", lambda: _card(gpu))
    report.attempt("info", "at best", lambda: _ceilings(gpu, tiny))
    report.attempt("info", "pinned memory", lambda: _pinning(gpu))
    for name, size in _COPIES.items():
        report.attempt("info", f"copies of {name}", lambda size=size: _copies(gpu, size))  # type: ignore[misc]


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "missing"


def _card(gpu: Gpu) -> Figures:
    if not gpu.is_gpu:
        return {"device": f"{gpu.name}, {torch.get_num_threads()} threads"}
    properties = torch.cuda.get_device_properties(gpu.device)
    free, total = torch.cuda.mem_get_info(gpu.device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "free GB": free / 1e9,
        "of": total / 1e9,
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "built for": " ".join(torch.cuda.get_arch_list()),
        "bfloat16": "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated",
    }


def _ceilings(gpu: Gpu, tiny: bool) -> Figures:
    source = torch.zeros(2**18 if tiny else 2**28, device=gpu.device)
    target = torch.empty_like(source)
    copied = gpu.seconds(lambda: target.copy_(source))
    n = 128 if tiny else 8192
    a, b = (torch.randn(n, n, device=gpu.device).bfloat16() for _ in range(2))
    product = gpu.seconds(lambda: a @ b)
    return {"memory GB/s": 2 * source.nbytes / copied / 1e9, "bfloat16 TFLOP/s": 2 * n**3 / product / 1e12}


def _pinning(gpu: Gpu) -> Figures:
    """WSL2 and some containers have little of it, or none."""
    if not gpu.is_real:
        return {"pinned": "not tried, as there is no driver"}
    try:
        torch.empty(2**20, pin_memory=True)
    except RuntimeError as error:
        return {"pinned": f"no: {str(error)[:100]}"}
    return {"pinned": "yes"}


def _copies(gpu: Gpu, size: int) -> Figures:
    host = torch.randn(size // 4)
    there = host.to(gpu.device)
    ways = {
        "there us": lambda: to_device(host, gpu.device),
        "plainly": lambda: host.to(gpu.device),
        "back us": lambda: to_host(there),
        "back plainly": lambda: there.cpu(),
    }
    return {name: 1e6 * gpu.seconds(way, rounds=20) for name, way in ways.items()}
