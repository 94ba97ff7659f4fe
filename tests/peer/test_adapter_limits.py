"""What PEFT computes for an adapter, of which its client sends nothing, is kept within a peer's limits."""

import json
from collections.abc import Callable

import pytest
import torch

from peer.adapters.store import AdapterStore
from peer.span.span import Span
from protocol.errors import BadAdapter
from tests.tools.lora import lora_manifest
from tests.tools.spans import START, WIDTH


def put_boft(store: AdapterStore, name: str, modules: tuple[str, ...] = ("q_proj",)) -> None:
    targets = [f"{START}.self_attn.{module}" for module in modules]
    shapes = {"boft_R": (1, WIDTH // 2, 2, 2), "boft_s": (WIDTH, 1)}
    tensors = {f"{target}.{part}.{name}": torch.zeros(shape) for target in targets for part, shape in shapes.items()}
    manifest = lora_manifest(targets, 4, 2.0) | {
        "adapters": [{"name": name, "method": "BOFT", "options": {"boft_block_size": 2}, "targets": targets}],
        "tensors": {tensor: number for number, tensor in enumerate(tensors)},
        "scaling": {},
        "trainable": [],
    }
    store.put(json.dumps(manifest), {str(i): tensor for i, tensor in enumerate(tensors.values())}, "client")


def test_what_peft_computes_is_kept_within_limits(spans: Callable[..., Span]) -> None:
    permutation = 4 * WIDTH**2
    store = AdapterStore(spans("llama"), 3 * permutation, client_count=6, client_bytes=3 * permutation)
    for number in range(5):
        put_boft(store, f"a{number}")
        sizes = [size for _, size in store._trees.values()]
        assert sizes == [permutation] * min(number + 1, 3)
    store.forget("client")
    assert not store._trees


def test_what_peft_would_compute_is_limited(spans: Callable[..., Span]) -> None:
    store = AdapterStore(spans("llama"), 7 * WIDTH**2, client_count=64, client_bytes=7 * WIDTH**2)
    put_boft(store, "small")
    with pytest.raises(BadAdapter, match="over this peer's limit"):
        put_boft(store, "large", ("q_proj", "o_proj"))
