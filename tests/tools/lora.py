"""LoRA adapters as a client puts them on a peer, made without a client."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.span.span import Span, find_module


def lora_manifest(targets: Sequence[str], rank: int, scaling: float, frozen: int = 0, **options: Any) -> dict[str, Any]:
    """Of one adapter on the modules `BLOCK.PATH`; the first `frozen` of its tensors are not trained.

    Each module's tensors have the numbers after those of the one before: A, B and, with `use_dora`, the magnitude.
    """
    parts = ["lora_A", "lora_B"] + ["lora_magnitude_vector"] * bool(options.get("use_dora"))
    names = [f"{target}.{part}.default.weight" for target in targets for part in parts]
    spec = {"name": "default", "method": "LORA", "options": {"r": rank, "lora_alpha": 8, **options}}
    return {
        "adapters": [spec | {"targets": list(targets), "parameters": []}],
        "scaling": {target: {"default": scaling} for target in targets},
        "tensors": {name: number for number, name in enumerate(names)},
        "trainable": sorted(names)[frozen:],
    }


def put_lora(
    store: AdapterStore, span: Span, targets: Sequence[str], rank: int, seed: int, owner: str = "me", **options: Any
) -> StoredAdapter:
    """An adapter that `owner` has put for modules of the span: random numbers, and a scaling, of this seed's own."""
    chance, tensors = torch.Generator().manual_seed(seed), list[torch.Tensor]()
    for target in targets:
        layer: Any = find_module(span.where.of(span.model), target)
        is_linear = isinstance(layer, nn.Linear)
        width, height = (layer.in_features, layer.out_features) if is_linear else (layer.nx, layer.nf)
        tensors.append(torch.randn(rank, width, generator=chance) / width**0.5)
        tensors.append(torch.randn(height, rank, generator=chance) / rank**0.5)
        if options.get("use_dora"):
            tensors.append(torch.rand(height, generator=chance) + 0.5)
    manifest = json.dumps(lora_manifest(targets, rank, 0.5 + seed / 4, **options))
    numbered = {str(number): tensor.to(span.dtype) for number, tensor in enumerate(tensors)}
    return store.get(store.put(manifest, numbered, owner), owner)
