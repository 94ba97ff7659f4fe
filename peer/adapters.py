"""Clients' adapters: one PEFT module tree per configuration, tensors put in per call, kept by content hash."""

import copy
import logging
import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from peer.quotas import Quota
from peer.span import Adapted, Span
from protocol.adapters import AdapterSpec, Manifest, bundle_hash
from protocol.errors import BadAdapter, UnknownAdapter
from protocol.tensors import nbytes

logger = logging.getLogger(__name__)

_MAX_TREES = 16
_SHARED = re.compile(r"\.(vera|randlora)_[AB]\.")


@dataclass(frozen=True)
class Bundle:
    """A client's adapters for some of the blocks, as it put them."""

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` -> tensor, on the span's device."""
    tree_key: str
    """What decides the module tree."""
    size: int
    """Bytes."""


class AdapterStore:
    """The bundles that clients put, the least recently used dropped first. A client holds them all itself.

    Each client may keep so many and so many bytes (`Quota`): its own oldest give way to its new ones. When all clients
    together have too much, those of the one that has most give way.
    """

    def __init__(self, span: Span, max_bytes: int, quota: Quota | None = None):
        self._span = span
        self._max_bytes, self._quota = max_bytes, quota or Quota()
        self._bundles = dict[bytes, Bundle]()
        self._owned = defaultdict[str, OrderedDict[bytes, int]](OrderedDict)
        """Client -> the hashes that it put, the least recently used first, and their sizes in bytes."""
        self._trees = OrderedDict[str, PreTrainedModel]()

    def put(self, manifest_json: str, tensors: Mapping[str, torch.Tensor], client: str = "") -> bytes:
        """Keep a bundle; returns its hash. Runs PEFT's construction, so it belongs on the compute thread.

        Raises `BadAdapter` when method, options, names or shapes are not acceptable.
        """
        manifest = Manifest.from_json(manifest_json)
        tree_key = manifest.config_key()
        numbered = _numbered(tensors)
        key = bundle_hash(manifest_json, numbered)
        size = nbytes(tensors) + len(manifest_json)
        if size > (limit := min(self._max_bytes, self._quota.adapter_bytes or self._max_bytes)):
            raise BadAdapter(f"An adapter of {size} bytes is over this peer's limit of {limit}.")
        if any(not 0 <= number < len(numbered) for number in manifest.tensors.values()):
            raise BadAdapter("The adapter's manifest refers to a tensor that was not sent.")
        device = [tensor.to(self._span.device) for tensor in numbered]
        named = {name: device[number] for name, number in manifest.tensors.items()}
        try:
            self._check(manifest, tree_key, named)
        except BadAdapter:
            self._trees.pop(tree_key, None)  # nobody can use it, and nobody paid for it in tensors
            raise
        self._bundles[key] = Bundle(manifest, named, tree_key, size)
        self._owned[client][key] = size
        self._owned[client].move_to_end(key)
        self._make_room(client)
        return key

    def get(self, key: bytes, client: str = "") -> Bundle:
        """The bundle of this hash, whoever put it. Raises `UnknownAdapter`."""
        if key not in self._bundles:
            raise UnknownAdapter(f"No adapter {key.hex()} here; put it and repeat the call.")
        own = self._owned.get(client)
        if own and key in own:
            own.move_to_end(key)
        return self._bundles[key]

    def _make_room(self, client: str) -> None:
        own, quota = self._owned[client], self._quota
        while len(own) > quota.adapters or sum(own.values()) > (quota.adapter_bytes or self._max_bytes):
            self._drop_oldest(client)
        while sum(bundle.size for bundle in self._bundles.values()) > self._max_bytes:
            self._drop_oldest(max(self._owned, key=lambda owner: sum(self._owned[owner].values())))

    def _drop_oldest(self, client: str) -> None:
        key, _ = self._owned[client].popitem(last=False)
        if not self._owned[client]:
            del self._owned[client]
        if not any(key in owned for owned in self._owned.values()):
            del self._bundles[key]

    def adapt(self, bundle: Bundle, tensors: Mapping[str, torch.Tensor]) -> Adapted:
        """The tree to run for `bundle`, with `tensors` (its own, or leaves made from them) in place."""
        tree = self._tree(bundle.manifest, bundle.tree_key)
        for name, factors in bundle.manifest.scaling.items():
            layer: Any = tree.get_submodule(f"{self._span.where.path}.{name}")
            layer.scaling.update(factors)
        return Adapted(tree, tensors)

    def _check(self, manifest: Manifest, tree_key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """`functional_call` ignores names that it does not know: find them here, and wrong shapes."""
        blocks = self._span.where.of(self._tree(manifest, tree_key))
        known = dict(blocks.named_parameters(remove_duplicate=False)) | dict(
            blocks.named_buffers(remove_duplicate=False)
        )
        own = {id(p) for p in self._span.model.parameters()} | {id(b) for b in self._span.model.buffers()}
        expected = {name: tensor for name, tensor in known.items() if id(tensor) not in own}
        for name, tensor in tensors.items():
            if name not in expected:
                raise BadAdapter(f"Tensor {name!r} is no part of the adapter that its configuration describes.")
            like = expected[name]
            if not _fits(name, tensor, like) or like.is_floating_point() != tensor.is_floating_point():
                raise BadAdapter(
                    f"Adapter tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; "
                    f"expected {like.dtype} {list(like.shape)}."
                )
        # What PEFT computed from the configuration (BOFT's permutations) is there already.
        if missing := {name for name, like in expected.items() if like.is_meta} - tensors.keys():
            raise BadAdapter(f"The adapter came without {len(missing)} of its tensors, such as {min(missing)!r}.")
        if unknown := set(manifest.trainable) - tensors.keys():
            raise BadAdapter(f"Trainable tensor {min(unknown)!r} is not in the adapter.")
        for name, factors in manifest.scaling.items():
            known_factors = getattr(self._module(blocks, name), "scaling", None)  # attention has one too, a number
            if not isinstance(known_factors, dict) or not factors.keys() <= known_factors.keys():
                raise BadAdapter(f"Module {name!r} has no scaling for {', '.join(factors)}.")

    @staticmethod
    def _module(blocks: torch.nn.Module, name: str) -> torch.nn.Module | None:
        try:
            return blocks.get_submodule(name)
        except AttributeError:
            return None

    def _tree(self, manifest: Manifest, key: str) -> PreTrainedModel:
        if key not in self._trees:
            self._trees[key] = self._build(manifest)
            while len(self._trees) > _MAX_TREES:
                self._trees.popitem(last=False)
        self._trees.move_to_end(key)
        return self._trees[key]

    def _build(self, manifest: Manifest) -> PreTrainedModel:
        tree = share_linears(self._span.model)
        blocks = self._span.where.of(tree)
        for spec in manifest.adapters:
            for target in spec.targets:
                if not self._own_module(blocks, target):
                    raise BadAdapter(
                        f"Adapter target {target!r} is no module of blocks {self._span.start}:{self._span.end}."
                    )
        self._check_parameters(blocks, manifest.adapters)
        self._inject(tree, manifest.adapters)
        active = [spec.name for spec in manifest.adapters]
        for module in tree.modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = active
                module._disable_adapters = False
        tree.eval().requires_grad_(False)
        return tree

    def _own_module(self, blocks: torch.nn.Module, name: str) -> torch.nn.Module | None:
        block = name.partition(".")[0]
        return self._module(blocks, name) if block.isdigit() and int(block) in self._span.blocks else None

    def _check_parameters(self, blocks: torch.nn.Module, specs: Sequence[AdapterSpec]) -> None:
        """PEFT makes LoRA of rank x experts for a parameter, before that can be compared with what came."""
        size = 0
        for spec in specs:
            ranks = spec.options.get("rank_pattern") or {}
            for name in spec.parameters:
                path, _, leaf = name.rpartition(".")
                parameter = getattr(self._own_module(blocks, path), "_parameters", {}).get(leaf)
                if parameter is None or parameter.ndim not in (2, 3) or not parameter.is_floating_point():
                    raise BadAdapter(
                        f"Adapter target {name!r} is no unquantized parameter of 2 or 3 dimensions of blocks "
                        f"{self._span.start}:{self._span.end}."
                    )
                *experts, rows, columns = parameter.shape
                rank = ranks.get(name, spec.options.get("r")) or 0
                size += max(rank, 0) * math.prod(experts) * (rows + columns) * parameter.element_size()
        if size > self._max_bytes:
            raise BadAdapter(f"An adapter of {size} bytes is over this peer's limit of {self._max_bytes}.")

    def _inject(self, tree: PreTrainedModel, specs: Sequence[AdapterSpec]) -> None:
        """Have PEFT put its modules into the tree, their tensors on the meta device where it can do so."""
        first, *rest = specs
        empty = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        try:
            with torch.random.fork_rng(devices=[]):
                wrapper = peft.get_peft_model(tree, self._config(first), adapter_name=first.name, **empty)
                for spec in rest:
                    wrapper.add_adapter(spec.name, self._config(spec), **empty)
        except Exception as error:  # PEFT's refusals come as many types
            raise BadAdapter(f"PEFT refuses the adapter {', '.join(spec.name for spec in specs)}: {error}") from error

    def _config(self, spec: AdapterSpec) -> peft.PeftConfig:
        path = self._span.where.path
        options = dict(spec.options)
        if "feedforward_modules" in options:
            options["feedforward_modules"] = [f"{path}.{name}" for name in options["feedforward_modules"]]
        return peft.get_peft_config(
            {"peft_type": spec.method, "target_modules": [f"{path}.{name}" for name in spec.targets], **options}
            | ({"target_parameters": [f"{path}.{name}" for name in spec.parameters]} if spec.parameters else {})
        )


def _fits(name: str, tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a tensor has the shape that PEFT gave it here, as far as a span can know it."""
    if tensor.ndim != like.ndim:
        return False
    pairs = list(zip(tensor.shape, like.shape, strict=True))
    if _SHARED.search(name):  # sized by the widest target of the whole model, sliced in use
        return all(theirs >= ours for theirs, ours in pairs)
    return all(theirs == ours for theirs, ours in pairs)


def share_linears(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same weights.

    Linear layers are shared as objects, not only their tensors: bitsandbytes keeps quantization state on the module
    from the first forward on. Others are not: LoRA on a parameter takes it out of its module and puts it back last, and
    PEFT nests its layers for later trees in the order in which it finds the parameters.
    """
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo[id(model.config)] = model.config
    memo |= {id(module): module for module in model.modules() if isinstance(module, torch.nn.Linear)}
    return copy.deepcopy(model, memo)


def _numbered(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    try:
        return [tensors[str(i)] for i in range(len(tensors))]
    except KeyError as error:
        raise BadAdapter("An adapter's tensors must be named 0, 1, 2, ...") from error
