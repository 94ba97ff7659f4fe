"""Products with a span's frozen weights, which training calls that run side by side compute in one go.

A small call spends its time reading weights (or dequantizing them). So where several calls come to the same linear
layer, forward or backward, their tokens are laid end to end for this one product. Everything else (norms, attention,
masks, a client's adapter) each call does for itself, in the trunk's own code, so that this serves every family.

Each call has an autograd graph of its own, though the products were joined: `_Product` saves nothing, and its backward
is a product with the same weight, for which calls may meet again: with the same companions, others, or none. The
alternatives cost more. With one graph for all (which a packed pass, `peer.generation.joined.packing`, would give), a
call whose companions stay away pays for their part of the backward pass, and the memory of all is held until the last
has come. Keeping inputs only and computing forward again costs three readings of the weights for a training step
instead of two, which two joined calls do not win back unless both of their passes are joined, and a call whose
companions stay away never.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peer.adapters.lora import Delta
from peer.span.span import Span
from peer.training.joined.side_by_side import Place, meet
from protocol.model.forwards import is_replaced, replaced
from protocol.model.split_linear import SplitLinear

Deltas = Mapping[str, Sequence[Delta]]
"""`BLOCK.PATH` of a linear layer -> what LoRA adds to it, in order."""

_deltas: ContextVar[Deltas] = ContextVar("deltas", default={})  # noqa: B039


def _dequantized(module: Any) -> torch.Tensor:
    """The weight (out, in) of a layer in nf4, as bitsandbytes' own backward pass makes it."""
    from bitsandbytes.functional import dequantize_4bit  # slow to import, and loaded where there is such a layer

    return dequantize_4bit(module.weight.data.view(-1, 1), module.weight.quant_state)  # type: ignore[no-any-return]


def _matrix(module: Any) -> Callable[[], torch.Tensor] | None:
    """What makes the weight (out, in) of a linear layer. `None` for other modules, and for layers that do not work row
    by row: bitsandbytes' int8 looks for outliers in all tokens of a product."""
    if type(module) in (nn.Linear, SplitLinear) or type(module).__name__ == "FalconLinear":
        return lambda: module.weight
    if type(module) is Conv1D:
        return lambda: module.weight.T
    return partial(_dequantized, module) if type(module).__name__ == "Linear4bit" else None


class _Product(torch.autograd.Function):
    """(tokens, out) of (tokens, in) by a layer whose parameters are frozen."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: "_Layer") -> torch.Tensor:
        ctx.layer = layer
        return meet(layer.ahead, rows)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return meet(ctx.layer.back, grad), None


class _Layer:
    """A linear layer's forward while calls can meet at it."""

    def __init__(self, module: nn.Module, matrix: Callable[[], torch.Tensor], name: str, number: int):
        self.module, self._matrix, self._name = module, matrix, name
        self.ahead, self.back = Place.forward(number, self._forward), Place.backward(number, self._backward)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """What PEFT gives: the layer's product, and what adapters add to it, cast to the layer's dtype."""
        product: torch.Tensor = _Product.apply(inputs.flatten(0, -2), self)  # type: ignore[no-untyped-call]
        output: torch.Tensor = product.unflatten(0, inputs.shape[:-1])  # type: ignore[no-untyped-call]
        dtype = output.dtype
        for delta in _deltas.get().get(self._name, ()):
            output = output + delta.of(inputs)
        return output.to(dtype)

    @torch.no_grad()
    def _forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return _in_one_go(lambda rows: type(self.module).forward(self.module, rows), inputs)

    @torch.no_grad()
    def _backward(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        matrix = self._matrix()
        return _in_one_go(lambda rows: rows @ matrix.to(rows.dtype), grads)


def _in_one_go(product: Callable[[torch.Tensor], torch.Tensor], items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The product of each of `items`. Copies, so that each call's activations are counted, and freed, by themselves."""
    if len(items) == 1:
        return [product(items[0])]
    sizes = [len(item) for item in items]
    return [rows.clone() for rows in product(torch.cat(list(items))).split(sizes)]


class Products:
    """The linear layers of a span at which calls can meet."""

    def __init__(self, span: Span):
        self._layers = dict[str, _Layer]()
        for name, module in span.where.of(span.model).named_modules():
            if (matrix := _matrix(module)) and not is_replaced(module):
                self._layers[name] = _Layer(module, matrix, name, len(self._layers))
        self._forwards = {layer.module: layer for layer in self._layers.values()}

    def have(self, names: Iterable[str]) -> bool:
        """Whether there are such layers at all, and all of `names` (`BLOCK.PATH`) are among them."""
        return bool(self._layers) and all(name in self._layers for name in names)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Within the block calls meet at them; graphs that are made in it meet in their backward passes, too."""
        with replaced(self._forwards, lambda module, _: self._forwards[module]):
            yield


@contextmanager
def adding(deltas: Deltas) -> Iterator[None]:
    """Within the block, inside that of `Products.meeting`, the layers add `deltas`, on this thread only."""
    token = _deltas.set(deltas)
    try:
        yield
    finally:
        _deltas.reset(token)
