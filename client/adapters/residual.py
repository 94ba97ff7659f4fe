"""The residual adapter: what PiSSA and OLoRA subtracted from remote weights, as one more LoRA adapter for the peers.

Peers keep the weight W; this machine works with the residual W - B A. So peers are sent B and A as an adapter that is
frozen, has no dropout and is scaled by -1. As on one machine, it is part of the weights: it applies whichever adapters
are active, also when all are disabled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from client.ghosts.questions import Subtracted
from client.ghosts.tensor import GhostTensor
from protocol.adapters import AdapterSpec

_NAME = "residual"


@dataclass(frozen=True)
class ResidualAdapter:
    """The adapter that makes peers' weights what they are on this machine."""

    spec: AdapterSpec
    scaling: Mapping[str, float]
    """`BLOCK.PATH` -> factor."""
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` of a parameter -> value, float32."""


def residual_adapter(blocks: nn.Module) -> ResidualAdapter | None:
    """The adapter for all weights of `blocks`; `None` when nothing was subtracted from any."""
    tensors, ranks, is_transposed = dict[str, torch.Tensor](), dict[str, int](), False
    for path, module, subtracted in _changed_weights(blocks):
        is_transposed = isinstance(module, Conv1D)
        a, b = (subtracted.b.mT, subtracted.a.mT) if is_transposed else (subtracted.a, subtracted.b)
        tensors |= {f"{path}.lora_A.{_NAME}.weight": a, f"{path}.lora_B.{_NAME}.weight": b}
        ranks[path] = len(a)
    if not ranks:
        return None
    options = {"r": max(ranks.values()), "rank_pattern": ranks, "fan_in_fan_out": is_transposed}
    spec = AdapterSpec(name=_NAME, method="LORA", options=options, targets=tuple(ranks))
    return ResidualAdapter(spec, dict.fromkeys(ranks, -1.0), tensors)


def _changed_weights(blocks: nn.Module) -> Iterator[tuple[str, nn.Module, Subtracted]]:
    """The weights from which something was subtracted: `BLOCK.PATH`, module, what was."""
    for module in blocks.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, GhostTensor) and weight.source and weight.subtracted is not None:
            yield weight.source.name.removesuffix(".weight"), module, weight.subtracted
