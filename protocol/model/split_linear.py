"""Linear layers of which all threads read the weight, however few tokens there are.

A product of a few rows takes the time in which its weight is read. In float32 MKL has one thread read it. As a batch of
products, each with a part of the weight's rows, several threads do. Every number is the same sum of the same products
as before, provided that the kernels take them in the same order: whether they do is tried, for each number of rows,
when a model is loaded, and so is whether it pays.
"""

import itertools
import logging
import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from protocol.machine.timing import fastest
from protocol.model.forwards import become

logger = logging.getLogger(__name__)

_MOST = 16
"""Rows that are tried. With more, threads have enough else to share."""
_ALIGNED = 16
"""A part has a multiple of so many of the weight's rows: kernels sum up odd ones in another order."""
_BUDGET = 0.2
"""Seconds after which no further numbers of rows are tried with layers of one shape."""
_PAYS = 1.1
"""How many times as fast a product of one row must be."""
_ATTEMPTS = 3
"""Measurements of whether it pays: on a machine that does something else, split products look slower than they are."""


class SplitLinear(nn.Linear):
    """An `nn.Linear` that splits small products over threads. Made of one by `split_linears`."""

    parts: int
    """How many parts the weight is split into."""
    splits: frozenset[int]
    """The numbers of rows at which products are split."""
    tried: torch.Size
    """The shape of the weight that was tried. Resizing tied embeddings gives a head another one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., out) of (..., in)."""
        rows = input.numel() // self.in_features
        # The compiler's graphs are of one token, or of any number, which must not be looked at.
        splits = rows == 1 and bool(self.splits) if torch.compiler.is_compiling() else rows in self.splits
        is_as_tried = self.weight.shape == self.tried
        if not (splits and is_as_tried) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _split_product(input, self.weight, self.bias, self.parts)

    def _apply(self, *args: Any, **kwargs: Any) -> "SplitLinear":
        self.splits = frozenset()  # what was tried may not hold for another dtype or device
        return super()._apply(*args, **kwargs)  # type: ignore[no-any-return]


@torch.no_grad()
def split_linears(model: nn.Module) -> None:
    """Have the linear layers of `model` split small products over the present number of threads, if right and quicker.

    Only plain layers in float32 on a CPU are tried: for other dtypes kernels use all threads already.
    """
    alike = defaultdict[tuple[torch.Size, bool], list[nn.Linear]](list)
    for module in model.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            alike[module.weight.shape, module.bias is None].append(module)
    for (shape, _), modules in alike.items():
        parts = _parts(modules[0].out_features)
        if parts > 1 and _pays(modules, parts) and 1 in (splits := _right_rows(modules[0], parts)):
            logger.info("%d linear layers of %s: %s rows in %d parts", len(modules), shape, sorted(splits), parts)
            for module in modules:
                become(module, SplitLinear, parts=parts, splits=splits, tried=shape)


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()


def _split_product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int) -> torch.Tensor:
    columns = weight.shape[1]
    batch = input.reshape(1, -1, columns).expand(parts, -1, -1)
    weights = weight.view(parts, -1, columns).transpose(1, 2)
    product = torch.bmm(batch, weights) if bias is None else torch.baddbmm(bias.view(parts, 1, -1), batch, weights)
    return product.transpose(0, 1).reshape(*input.shape[:-1], weight.shape[0])


def _parts(rows: int) -> int:
    """The largest number of parts into which a weight of so many rows can be split, at most one a thread."""
    return max(parts for parts in range(1, torch.get_num_threads() + 1) if rows % (parts * _ALIGNED) == 0 or parts == 1)


def _right_rows(module: nn.Linear, parts: int) -> frozenset[int]:
    """The numbers of rows at which split products are the same to the last bit, as far as there was time to try."""
    until = time.monotonic() + _BUDGET
    in_time = itertools.takewhile(lambda rows: rows == 1 or time.monotonic() < until, range(1, _MOST + 1))
    return frozenset(rows for rows in in_time if _is_right(module, rows, parts))


def _is_right(module: nn.Linear, rows: int, parts: int) -> bool:
    input = _random(module, rows)
    return torch.equal(module(input), _split_product(input, module.weight, module.bias, parts))


def _pays(modules: list[nn.Linear], parts: int) -> bool:
    """Whether a product of one row is quick enough when split. Layers take turns: a cache may hold one weight."""
    input, layers = _random(modules[0], 1), itertools.cycle(modules)

    def split() -> None:
        module = next(layers)
        _split_product(input, module.weight, module.bias, parts)

    return any(fastest(lambda: next(layers)(input)) >= _PAYS * fastest(split) for _ in range(_ATTEMPTS))


def _random(module: nn.Linear, rows: int) -> torch.Tensor:
    return torch.randn(1, rows, module.in_features, generator=torch.Generator().manual_seed(rows))
