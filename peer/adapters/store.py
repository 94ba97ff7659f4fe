"""Clients' adapters: one PEFT module tree per configuration, tensors put in for each pass, kept by content hash."""

import logging
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from peer.adapters.lora import Lora, find_lora
from peer.span.span import Adapted, Span, find_module
from peer.span.transfer import to_device
from protocol.adapters import Manifest, bundle_hash
from protocol.errors import BadAdapter, UnknownAdapter
from protocol.tensors import nbytes

logger = logging.getLogger(__name__)

_MAX_TREES = 16
_SHARED = re.compile(r"\.(vera|randlora)_[AB]\.")


@dataclass(frozen=True)
class StoredAdapter:
    """A client's adapters for some of the blocks, as they are kept here: all that one `PutAdapter` brought."""

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    """`BLOCK.PATH` -> tensor, on the span's device."""
    tree_key: str
    """What decides the module tree."""
    size: int
    """Bytes."""
    lora: Lora | None
    """The same, where it can be run along with others'."""


class AdapterStore:
    """The adapters that clients put, the least recently used dropped first. A client holds them all itself.

    Each client may keep `client_count` of them and `client_bytes` bytes: its own oldest give way to its new ones. When
    all clients together keep more than `max_bytes`, those of the one that has most give way.
    """

    def __init__(self, span: Span, max_bytes: int, client_count: int, client_bytes: int):
        self._span, self._max_bytes = span, max_bytes
        self._client_count, self._client_bytes = client_count, min(client_bytes, max_bytes)
        self._adapters = dict[bytes, StoredAdapter]()
        self._owned = defaultdict[str, OrderedDict[bytes, int]](OrderedDict)
        """Client -> the hashes that it put, the least recently used first, and their sizes in bytes."""
        self._trees = OrderedDict[str, tuple[PreTrainedModel, int]]()
        """`StoredAdapter.tree_key` -> module tree and its bytes, the least recently used first."""

    @property
    def size(self) -> int:
        """Bytes of the adapters, and of what PEFT computed of their configurations."""
        adapters, trees = list(self._adapters.values()), list(self._trees.values())  # the compute thread changes them
        return sum(adapter.size for adapter in adapters) + sum(size for _, size in trees)

    def put(self, manifest_json: str, tensors: Mapping[str, torch.Tensor], client: str) -> bytes:
        """Keep an adapter; returns its hash. Runs PEFT's construction, so it belongs on the compute thread.

        Raises `BadAdapter` when method, options, names or shapes are not acceptable.
        """
        manifest = Manifest.from_json(manifest_json)
        tree_key = manifest.config_key()
        numbered = _numbered(tensors)
        key = bundle_hash(manifest_json, numbered)
        size = nbytes(tensors) + len(manifest_json)
        if size > self._client_bytes:
            raise BadAdapter(f"An adapter of {size} bytes is over this peer's limit of {self._client_bytes}.")
        if any(not 0 <= number < len(numbered) for number in manifest.tensors.values()):
            raise BadAdapter("The adapter's manifest refers to a tensor that was not sent.")
        device = [to_device(tensor, self._span.device) for tensor in numbered]
        named = {name: device[number] for name, number in manifest.tensors.items()}
        try:
            self._check(manifest, tree_key, named)
        except BadAdapter:
            self._trees.pop(tree_key, None)  # nobody can use it, and nobody paid for it in tensors
            raise
        self._adapters[key] = StoredAdapter(manifest, named, tree_key, size, find_lora(self._span, manifest, named))
        self._owned[client][key] = size
        self._owned[client].move_to_end(key)
        self._make_room(client)
        return key

    def get(self, key: bytes, client: str) -> StoredAdapter:
        """The adapter of this hash, whoever put it. Raises `UnknownAdapter`."""
        if key not in self._adapters:
            raise UnknownAdapter(f"No adapter {key.hex()} here; put it and repeat the request.")
        own = self._owned.get(client)
        if own and key in own:
            own.move_to_end(key)
        return self._adapters[key]

    def forget(self, client: str) -> None:
        """Drop what a client put, as far as nobody else has put it too: it has gone."""
        while client in self._owned:
            self._drop_oldest(client)

    def _make_room(self, client: str) -> None:
        own = self._owned[client]
        while len(own) > self._client_count or sum(own.values()) > self._client_bytes:
            self._drop_oldest(client)
        while sum(adapter.size for adapter in self._adapters.values()) > self._max_bytes:
            self._drop_oldest(max(self._owned, key=lambda owner: sum(self._owned[owner].values())))

    def _drop_oldest(self, client: str) -> None:
        key, _ = self._owned[client].popitem(last=False)
        if not self._owned[client]:
            del self._owned[client]
        if not any(key in owned for owned in self._owned.values()):
            tree_key = self._adapters.pop(key).tree_key
            if all(adapter.tree_key != tree_key for adapter in self._adapters.values()):
                self._trees.pop(tree_key, None)

    def adapt(self, adapter: StoredAdapter, tensors: Mapping[str, torch.Tensor]) -> Adapted:
        """The tree to run for `adapter`, with `tensors` (its own, or leaves made from them) in place."""
        tree = self._tree(adapter.manifest, adapter.tree_key)
        for name, factors in adapter.manifest.scaling.items():
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
            known_factors = getattr(find_module(blocks, name), "scaling", None)  # attention has one too, a number
            if not isinstance(known_factors, dict) or not factors.keys() <= known_factors.keys():
                raise BadAdapter(f"Module {name!r} has no scaling for {', '.join(factors)}.")

    def _tree(self, manifest: Manifest, key: str) -> PreTrainedModel:
        if key not in self._trees:
            # Here, as it imports PEFT: that takes seconds, in which a peer can serve already.
            from peer.adapters.peft_trees import build_tree, own_bytes

            tree = build_tree(self._span, manifest.adapters, self._max_bytes)
            self._trees[key] = tree, own_bytes(tree, self._span.model)
            while len(self._trees) > _MAX_TREES or sum(size for _, size in self._trees.values()) > self._max_bytes:
                self._trees.popitem(last=False)
            return tree
        self._trees.move_to_end(key)
        return self._trees[key][0]


def _fits(name: str, tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a tensor has the shape that PEFT gave it here, as far as a span can know it."""
    if tensor.ndim != like.ndim:
        return False
    pairs = list(zip(tensor.shape, like.shape, strict=True))
    if _SHARED.search(name):  # sized by the widest target of the whole model, sliced in use
        return all(theirs >= ours for theirs, ours in pairs)
    return all(theirs == ours for theirs, ours in pairs)


def _numbered(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    try:
        return [tensors[str(i)] for i in range(len(tensors))]
    except KeyError as error:
        raise BadAdapter("An adapter's tensors must be named 0, 1, 2, ...") from error
