"""Row norms of a base weight, which DoRA begins with; and finding the weight that a request names."""

import torch
from torch import nn

from peer.span.span import Span, find_module
from protocol.errors import BadRequest


def find_matrix(span: Span, name: str) -> nn.Module:
    """The module of the weight `BLOCK.PATH.weight`.

    Raises `BadRequest` for a name that is no weight matrix of this span.
    """
    path, _, leaf = name.rpartition(".")
    is_here = path.partition(".")[0] in map(str, span.blocks)
    module = find_module(span.where.of(span.model), path) if is_here else None  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if leaf != "weight" or module is None or weight is None or weight.ndim != 2:
        raise BadRequest(f"{name!r} is no weight matrix of blocks {span.start}:{span.end}.")
    return module


def read_norm(span: Span, name: str, transposed: bool, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The 2-norm over `dims` of the weight `BLOCK.PATH.weight`, cast to `dtype` first as PEFT does.

    Raises `BadRequest` for a name that is no weight matrix of this span.
    """
    module = find_matrix(span, name)
    if not dims or not set(dims) <= {0, 1, -1, -2} or len({dim % 2 for dim in dims}) < len(dims):
        raise BadRequest(f"Norms of a matrix are over dimensions 0 or 1, not {dims}.")
    from peer.base_weights.dequantized import dequantized_weight

    weight = dequantized_weight(module).to(dtype)
    norm: torch.Tensor = torch.linalg.vector_norm(weight.T if transposed else weight, dim=dims)
    return norm
