"""Module trees with PEFT's layers, built from checked specifications over a span's own weights."""

import copy
import math
from collections.abc import Sequence

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peer.span import Span, find_module
from protocol.adapters import AdapterSpec
from protocol.errors import BadAdapter


def build_tree(span: Span, specs: Sequence[AdapterSpec], max_bytes: int) -> PreTrainedModel:
    """The span's model with PEFT's layers for `specs`, all active; their tensors on the meta device where possible.

    Raises `BadAdapter` for targets that are not here, adapters over `max_bytes`, and what PEFT refuses.
    """
    tree = share_linears(span.model)
    blocks = span.where.of(tree)
    for spec in specs:
        for target in spec.targets:
            if not _own_module(span, blocks, target):
                raise BadAdapter(f"Adapter target {target!r} is no module of blocks {span.start}:{span.end}.")
    _check_parameters(span, blocks, specs, max_bytes)
    _inject(tree, span.where.path, specs)
    active = [spec.name for spec in specs]
    for module in tree.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = active
            module._disable_adapters = False
    tree.eval().requires_grad_(False)
    return tree


def share_linears(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weights.

    Linear layers are shared as objects, not only their tensors: bitsandbytes keeps quantization state on the module
    from the first forward on, and calls that run together meet at them. Others are not: LoRA on a parameter takes it
    out of its module and puts it back last, and PEFT nests its layers for later trees in the order in which it finds
    the parameters.
    """
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo[id(model.config)] = model.config
    memo |= {id(module): module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    return copy.deepcopy(model, memo)


def _own_module(span: Span, blocks: nn.Module, name: str) -> nn.Module | None:
    block = name.partition(".")[0]
    return find_module(blocks, name) if block.isdigit() and int(block) in span.blocks else None


def _check_parameters(span: Span, blocks: nn.Module, specs: Sequence[AdapterSpec], max_bytes: int) -> None:
    """PEFT makes LoRA of rank x experts for a parameter, before that can be compared with what came."""
    size = 0
    for spec in specs:
        ranks = spec.options.get("rank_pattern") or {}
        for name in spec.parameters:
            path, _, leaf = name.rpartition(".")
            parameter = getattr(_own_module(span, blocks, path), "_parameters", {}).get(leaf)
            if parameter is None or parameter.ndim not in (2, 3) or not parameter.is_floating_point():
                raise BadAdapter(
                    f"Adapter target {name!r} is no unquantized parameter of 2 or 3 dimensions of blocks "
                    f"{span.start}:{span.end}."
                )
            *experts, rows, columns = parameter.shape
            rank = ranks.get(name, spec.options.get("r")) or 0
            size += max(rank, 0) * math.prod(experts) * (rows + columns) * parameter.element_size()
    if size > max_bytes:
        raise BadAdapter(f"An adapter of {size} bytes is over this peer's limit of {max_bytes}.")


def _inject(tree: PreTrainedModel, path: str, specs: Sequence[AdapterSpec]) -> None:
    first, *rest = specs
    empty = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    try:
        with torch.random.fork_rng(devices=[]):
            wrapper = peft.get_peft_model(tree, _config(path, first), adapter_name=first.name, **empty)
            for spec in rest:
                wrapper.add_adapter(spec.name, _config(path, spec), **empty)
    except Exception as error:  # PEFT's refusals come as many types
        raise BadAdapter(f"PEFT refuses the adapter {', '.join(spec.name for spec in specs)}: {error}") from error


def _config(path: str, spec: AdapterSpec) -> peft.PeftConfig:
    options = dict(spec.options)
    if "feedforward_modules" in options:
        options["feedforward_modules"] = [f"{path}.{name}" for name in options["feedforward_modules"]]
    return peft.get_peft_config(
        {"peft_type": spec.method, "target_modules": [f"{path}.{name}" for name in spec.targets], **options}
        | ({"target_parameters": [f"{path}.{name}" for name in spec.parameters]} if spec.parameters else {})
    )
