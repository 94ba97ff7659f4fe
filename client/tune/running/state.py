"""What PEFT's own files do not keep but an exact continuation needs.

PEFT saves an adapter for use: of P-tuning and prefix tuning the computed prompts and not the encoder that makes them,
of AdaLoRA nothing of the sensitivities its rank allocation averages. So a checkpoint carries every trained tensor.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from client.tune.errors import OutputError

_TENSORS = "trained.safetensors"
_RANKS = "ranks.json"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes every tensor that training changes to `folder`.

    Raises:
        OSError, SafetensorError: it can't be written.
    """
    tensors = {f"parameter/{name}": value.detach().cpu().contiguous() for name, value in _trained(model)}
    allocator = _allocator(model)
    if allocator is not None:
        for average in _AVERAGES:
            tensors |= {f"{average}/{name}": value.cpu() for name, value in getattr(allocator, average).items()}
        (folder / _RANKS).write_text(json.dumps(allocator.peft_config.rank_pattern), encoding="utf-8")
    save_file(tensors, folder / _TENSORS)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Puts back what `save_trained` wrote, in place: the optimizer keeps its hold on the parameters.

    Raises:
        OutputError: the names or shapes are not those of this model's trainable parameters.
    """
    kept = load_file(folder / _TENSORS)
    trained = dict(_trained(model))
    saved = {name.removeprefix("parameter/"): value for name, value in kept.items() if name.startswith("parameter/")}
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in trained.items()}:
        raise OutputError(f"{folder} was written for another adapter or model; name another output")
    with torch.no_grad():
        for name, value in saved.items():
            trained[name].copy_(value)
    _load_ranks(model, folder, kept)


def _load_ranks(model: nn.Module, folder: Path, kept: dict[str, Tensor]) -> None:
    allocator = _allocator(model)
    if allocator is None:
        return
    allocator.peft_config.rank_pattern = json.loads((folder / _RANKS).read_text(encoding="utf-8"))
    devices = {name: value.device for name, value in _trained(model)}
    for average in _AVERAGES:
        found = {name.partition("/")[2]: value for name, value in kept.items() if name.startswith(f"{average}/")}
        setattr(allocator, average, {name: value.to(devices.get(name, "cpu")) for name, value in found.items()})


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def _allocator(model: nn.Module) -> Any:
    """AdaLoRA's rank allocator, None for every other method."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


class RandomState:
    """The state of every random generator a step draws from, at the moment this was made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Sets the generators back to it."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
