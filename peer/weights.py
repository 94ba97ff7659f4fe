"""What a client may ask of a base weight: row norms (DoRA's initialisation needs them); for factors see `factors`."""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from peer.span import Span
from protocol.errors import BadRequest


def find_matrix(span: Span, name: str) -> nn.Module:
    """The module of the weight `BLOCK.PATH.weight`.

    Raises `BadRequest` for a name that is no weight matrix of this span.
    """
    path, _, leaf = name.rpartition(".")
    is_here = path.partition(".")[0] in map(str, span.blocks)
    try:
        module = span.where.of(span.model).get_submodule(path) if is_here else None
    except AttributeError:
        module = None
    weight = getattr(module, "weight", None)
    if leaf != "weight" or module is None or weight is None or weight.ndim != 2:
        raise BadRequest(f"{name!r} is no weight matrix of blocks {span.start}:{span.end}.")
    return module


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The module's weight, dequantized: (rows, columns)."""
    weight: Any = module.weight
    if isinstance(module, Linear8bitLt):  # PEFT's helper replaces the weight, on a CPU, by one without its scales
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        weight = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)
    elif isinstance(module, nn.Linear):
        weight = dequantize_module_weight(module)
    return weight.detach()  # type: ignore[no-any-return]


def read_norm(span: Span, name: str, transposed: bool, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The 2-norm over `dims` of the weight `BLOCK.PATH.weight`, cast to `dtype` first as PEFT does.

    Raises `BadRequest` for a name that is no weight matrix of this span.
    """
    module = find_matrix(span, name)
    if not dims or not set(dims) <= {0, 1, -1, -2} or len({dim % 2 for dim in dims}) < len(dims):
        raise BadRequest(f"Norms of a matrix are over dimensions 0 or 1, not {dims}.")
    dense = dense_weight(module).to(dtype)
    norm: torch.Tensor = torch.linalg.vector_norm(dense.T if transposed else dense, dim=dims)
    return norm
