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

from peer.span.span import Span, find_module
from protocol.adapters import AdapterSpec
from protocol.errors import BadAdapter
from protocol.model.anatomy import configurations
from protocol.model.loading import LOADING


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
    size = sum(_parameter_bytes(span, blocks, spec) + _permutation_bytes(blocks, spec) for spec in specs)
    if size > max_bytes:
        raise BadAdapter(f"An adapter of {size} bytes is over this peer's limit of {max_bytes}.")
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
    from the first forward on, and what replaces a layer's forward (`protocol.model.forwards`) does so for all trees.
    Other modules are not shared: LoRA on a parameter takes it out of its module and puts it back last, and PEFT nests
    its layers for later trees in the order in which it finds the parameters.
    """
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(config): config for config in configurations(model)}
    memo |= {id(module): module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    return copy.deepcopy(model, memo)


def _own_module(span: Span, blocks: nn.Module, name: str) -> nn.Module | None:
    block = name.partition(".")[0]
    return find_module(blocks, name) if block.isdigit() and int(block) in span.blocks else None


def own_bytes(tree: PreTrainedModel, model: PreTrainedModel) -> int:
    """What `tree` takes beside the weights that it shares with `model`: what PEFT computed, for no client sent it."""
    shared = {storage.data_ptr() for storage in _storages(model)}
    return sum({s.data_ptr(): s.nbytes() for s in _storages(tree) if s.data_ptr() not in shared}.values())


def _storages(model: nn.Module) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in (*model.parameters(), *model.buffers()) if not t.is_meta]


def _parameter_bytes(span: Span, blocks: nn.Module, spec: AdapterSpec) -> int:
    """PEFT makes LoRA of rank x experts for a parameter, before that can be compared with what came."""
    size = 0
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
    return size


def _permutation_bytes(blocks: nn.Module, spec: AdapterSpec) -> int:
    """BOFT's are dense matrices over a module's inputs, of which a client sends nothing."""
    if spec.method != "BOFT":
        return 0
    factors = spec.options.get("boft_n_butterfly_factor")
    count = max(factors, 1) if isinstance(factors, int) else 1
    widths = [getattr(find_module(blocks, target), "in_features", 0) for target in spec.targets]
    return sum(count * width**2 * torch.float32.itemsize for width in widths)


def _inject(tree: PreTrainedModel, path: str, specs: Sequence[AdapterSpec]) -> None:
    first, *rest = specs
    empty = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    try:
        with LOADING, torch.random.fork_rng(devices=[]):  # PEFT replaces a function of PyTorch's for `empty`
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
