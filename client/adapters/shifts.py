"""What PiSSA and OLoRA subtracted from remote weights, as one more LoRA adapter: frozen, without dropout, negated.

It belongs to the weights, as locally: it is there whichever adapters are active, and when they are disabled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from client.ghosts.questions import Shift
from client.ghosts.tensor import GhostTensor
from protocol.adapters import AdapterSpec

NAME = "base-shift"


@dataclass(frozen=True)
class ShiftAdapter:
    """The adapter that makes peers' weights what they are here."""

    spec: AdapterSpec
    scaling: Mapping[str, float]
    """`BLOCK.PATH` -> factor."""
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` of a parameter -> value."""


def shifts(blocks: nn.Module) -> Iterator[tuple[str, nn.Module, Shift]]:
    """The weights in which something was subtracted: `BLOCK.PATH`, module, shift."""
    for module in blocks.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, GhostTensor) and weight.source and weight.shift is not None:
            yield weight.source.name.removesuffix(".weight"), module, weight.shift


def shift_adapter(blocks: nn.Module) -> ShiftAdapter | None:
    """The adapter for all weights of `blocks`; `None` when they are as the peers hold them."""
    tensors, ranks, is_transposed = dict[str, torch.Tensor](), dict[str, int](), False
    for path, module, shift in shifts(blocks):
        is_transposed = isinstance(module, Conv1D)
        a, b = (shift.b.mT, shift.a.mT) if is_transposed else (shift.a, shift.b)
        tensors |= {f"{path}.lora_A.{NAME}.weight": a, f"{path}.lora_B.{NAME}.weight": b}
        ranks[path] = len(a)
    if not ranks:
        return None
    options = {"r": max(ranks.values()), "rank_pattern": ranks, "fan_in_fan_out": is_transposed}
    spec = AdapterSpec(name=NAME, method="LORA", options=options, targets=tuple(ranks))
    return ShiftAdapter(spec, dict.fromkeys(ranks, -1.0), tensors)
