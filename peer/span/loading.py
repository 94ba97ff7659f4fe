"""Loading a span: only its blocks' tensors are fetched, read, and quantized as they come."""

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from peer.span.cut import cut_to_span
from peer.span.rotary import forget_between_calls
from peer.span.span import Span
from protocol.errors import UnsupportedModel
from protocol.machine.devices import suitable_dtype
from protocol.model.anatomy import find_blocks
from protocol.model.checkpoint import Checkpoint
from protocol.model.classes import CAUSAL_LM, class_for
from protocol.model.loading import LOADING, load_part
from protocol.model.tensor_names import blocks_of


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    quantization: str = "none",
    double_quantization: bool = False,
) -> Span:
    """Blocks [start, end) of `checkpoint`, ready to run. `dtype` None: the checkpoint's own, or float16
    in the place of bfloat16, where that is not for the device.

    Raises `UnsupportedModel` for an architecture that spans cannot serve, or for missing weights.
    """
    cls, config = class_for(checkpoint, CAUSAL_LM)
    dtype = dtype or suitable_dtype(checkpoint.dtype, torch.device(device))
    with LOADING, torch.device("meta"):
        donor = cls(config)
    where = find_blocks(donor)
    blocks = blocks_of(checkpoint.weight_map, donor, where)
    state_dict = checkpoint.state_dict(lambda name: blocks.get(name) in range(start, end))
    model, missing = load_part(
        cls,
        config,
        state_dict,
        lambda model: cut_to_span(model, start, end),
        dtype=dtype,
        device_map={"": device},
        **_quantization_options(quantization, double_quantization, dtype),
    )
    missing = [name for name in missing if name.startswith(f"{where.path}.")]
    if missing:
        raise UnsupportedModel(f"{checkpoint.name} lacks weights of blocks {start}:{end}, such as {missing[0]}.")
    _forbid_packing(model)
    forget_between_calls(model)
    return Span(model, where, start, end, dtype)


def block_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None, quantization: str) -> int:
    """Bytes that one block's weights will take, about, by the sizes that its configuration gives."""
    cls, config = class_for(checkpoint, CAUSAL_LM)
    with LOADING, torch.device("meta"):
        model = cls(config)
    block = find_blocks(model).of(model)[0]
    bytes_per_weight = {"none": (dtype or checkpoint.dtype).itemsize, "int8": 1.05, "nf4": 0.57}[quantization]
    return max(1, int(sum(p.numel() for p in block.parameters()) * bytes_per_weight))


def _quantization_options(quantization: str, double: bool, dtype: torch.dtype) -> dict[str, Any]:
    if quantization == "none":
        return {}
    if quantization == "int8":
        # Otherwise a line for every single matmul, saying that int8 works in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def _forbid_packing(model: PreTrainedModel) -> None:
    """bitsandbytes packs nf4 weights in place at the first no-grad forward on avx512_bf16 CPUs; a later backward then
    yields no gradient, and no error."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
