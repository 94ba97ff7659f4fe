"""Weights as plain floats, whatever form a span holds them in. Imports PEFT and bitsandbytes, which take seconds."""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from torch import nn


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The module's weight as floats: (rows, columns)."""
    weight: Any = module.weight
    if isinstance(module, Linear8bitLt):  # on a CPU PEFT's helper would replace the weight by one without its scales
        scales = module.state.SCB if module.state.SCB is not None else weight.SCB
        weight = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales)
    elif isinstance(module, nn.Linear):
        weight = dequantize_module_weight(module)
    return weight.detach()  # type: ignore[no-any-return]
