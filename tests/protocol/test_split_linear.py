"""Linear layers split over threads give the same bits, and are used only where they do and where it pays."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peer.span.loading import load_span
from peer.span.span import Span
from peer.training.joined.products import Products
from protocol.model import split_linear
from protocol.model.checkpoint import open_checkpoint
from protocol.model.split_linear import SplitLinear, split_linears
from tests.tools.desk import Desk, play
from tests.tools.spans import END, START
from tests.tools.swarm import Both, Swarm


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And models so small that nothing pays for them."""
    monkeypatch.setattr(split_linear, "_PAYS", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def load(models: Callable[[str], Path]) -> Callable[[str], Span]:
    return lambda family: load_span(open_checkpoint(str(models(family))), START, END)


def split_layers(model: nn.Module) -> list[SplitLinear]:
    return [module for module in model.modules() if isinstance(module, SplitLinear)]


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral"])  # bloom: with biases
def test_the_same_bits(load: Callable[[str], Span], family: str) -> None:
    plain, ours = load(family), load(family)
    split_linears(ours.model)
    assert split_layers(ours.model)
    assert all(1 in layer.splits for layer in split_layers(ours.model))
    expected, found = Desk(plain), Desk(ours)
    for mine, other in zip(play(found, found.each, False), play(expected, expected.each, False), strict=True):
        assert torch.equal(mine, other)


def test_small_products_only(load: Callable[[str], Span], monkeypatch: pytest.MonkeyPatch) -> None:
    """And none that gradients are wanted of."""
    span = load("llama")
    split_linears(span.model)
    layer, seen = split_layers(span.model)[0], list[int]()
    split = split_linear._split_product

    def spy(states: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(states.shape[1])
        return split(states, *args)

    monkeypatch.setattr(split_linear, "_split_product", spy)
    for rows in (1, 1000):
        layer(torch.randn(1, rows, layer.in_features))
    assert seen == []
    with torch.no_grad():
        for rows in (1, 1000):
            layer(torch.randn(1, rows, layer.in_features))
    assert seen == [1]


def test_different_bits(load: Callable[[str], Span], monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_linear._split_product
    monkeypatch.setattr(split_linear, "_split_product", lambda *args: 1.000001 * split(*args))
    span = load("llama")
    split_linears(span.model)
    assert not split_layers(span.model)


def test_no_gain(load: Callable[[str], Span], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_linear, "_PAYS", 1e9)
    span = load("llama")
    split_linears(span.model)
    assert not split_layers(span.model)


def test_one_thread(load: Callable[[str], Span]) -> None:
    torch.set_num_threads(1)
    span = load("llama")
    split_linears(span.model)
    assert not split_layers(span.model)


def test_training_calls_meet_at_them(load: Callable[[str], Span]) -> None:
    span = load("llama")
    split_linears(span.model)
    names = [name for name, module in span.where.of(span.model).named_modules() if isinstance(module, SplitLinear)]
    assert names
    assert Products(span).have(names)


def test_not_after_a_conversion(load: Callable[[str], Span]) -> None:
    """Of which nothing is known."""
    span = load("llama")
    split_linears(span.model)
    layer = split_layers(span.model)[0]
    assert layer.splits
    layer.to(torch.bfloat16)
    assert not layer.splits


def test_not_with_another_weight(load: Callable[[str], Span]) -> None:
    """As `resize_token_embeddings` gives a tied head."""
    span = load("llama")
    split_linears(span.model)
    layer = split_layers(span.model)[0]
    layer.weight = nn.Parameter(torch.randn(129, layer.in_features))
    hidden = torch.randn(1, 1, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight))


def test_the_head_of_a_client(llama_swarm: tuple[Path, Swarm]) -> None:
    both = Both(*llama_swarm)
    ours, plain = both.remote().lm_head, both.local().lm_head
    assert 1 in ours.splits
    with torch.no_grad():
        for rows in range(1, 20):
            hidden = torch.randn(rows, 1, plain.in_features)
            assert torch.equal(ours(hidden), plain(hidden))
