"""LoRA on linear layers, as plain matrices: such adapters of several clients can be run in one trunk pass.

The base runs once, and each client's tokens get a delta of their own: see `peer.generation.joined.lora_rows` for steps
and `peer.training.joined.products` for training calls.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from peer.span.span import Span, find_module
from protocol.adapters import Manifest

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])\.(?P<adapter>[^.]+)\.weight$")


@dataclass(frozen=True)
class Delta:
    """`scaling * b @ a`, what LoRA adds to a weight. a: (rank, in), b: (out, rank), of one dtype."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def of(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., out) of inputs (..., in), cast as PEFT does."""
        return linear(linear(inputs.to(self.a.dtype), self.a), self.b) * self.scaling


@dataclass(frozen=True, eq=False)
class Lora:
    """A stored adapter that is nothing but LoRA on linear layers: `BLOCK.PATH` of a module -> its deltas, in order."""

    deltas: Mapping[str, Sequence[Delta]]


def find_lora(span: Span, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Lora | None:
    """The checked adapter as deltas; `None` when it is anything else (DoRA, biases, experts, other methods)."""
    factors: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if not (match := _FACTOR.match(name)):
            return None
        factors.setdefault((match["module"], match["adapter"]), {})[match["factor"]] = tensor
    deltas: dict[str, list[Delta]] = {}
    for spec in manifest.adapters:
        if spec.method != "LORA" or spec.options.get("use_dora") or spec.parameters:
            return None
        for module in spec.targets:
            delta = _delta(factors.pop((module, spec.name), {}), manifest.scaling.get(module, {}).get(spec.name))
            if delta is None or not _sees_every_token(span, module):
                return None
            deltas.setdefault(module, []).append(delta)
    return None if factors else Lora(deltas)


def _delta(factors: Mapping[str, torch.Tensor], scaling: float | None) -> Delta | None:
    a, b = factors.get("A"), factors.get("B")
    if a is None or b is None or scaling is None or a.dtype != b.dtype or a.ndim != 2 or b.ndim != 2:
        return None
    return Delta(a, b, scaling)


def _sees_every_token(span: Span, name: str) -> bool:
    """Whether a module is a linear layer that runs on all tokens in order: an expert's gets those routed to it."""
    _, *path = name.split(".")
    module = find_module(span.where.of(span.model), name)
    return isinstance(module, nn.Linear | Conv1D) and not any(part.isdigit() or "expert" in part for part in path)
