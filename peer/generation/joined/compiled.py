"""Steps by compiled code: a span's blocks by `torch.compile`, each one graph, on a GPU with CUDA graphs.

Attention goes through an operation that the compiler does not look into. It works on the sessions' caches, which lie
somewhere else and are longer at every step; everything around it sees nothing but some tokens end to end, as in every
packed pass. So there are two graphs per type of block, one for a single token and one for any number, and all blocks
of a type share them. CUDA graphs end before the operation and begin again after it (piecewise, as in vLLM).
"""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from peer.generation.joined.batched_pass import BatchedPass
from peer.generation.joined.packing import Masks, Packer, packed_mask
from peer.span.span import Adapted, Mode, Span
from protocol.model.forwards import Forward, register_attention, replaced

_NAME = "hivetune_compiled"
_MOST = 64
"""Tokens in one pass that gain by it: with more the products take nearly all of the time."""


class _Table:
    """What attention needs to know of a packed pass beside its queries, keys and values."""

    def __init__(self) -> None:
        self.seen = dict[int, tuple[nn.Module, dict[str, Any]]]()
        """Block -> its attention module, and how it calls attention functions."""
        self.block = 0
        """The block that is running."""
        self.masks: Masks | None = None
        """Of the block that is running."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(1, all tokens, heads, head size), of the block that is running: see `peer.generation.joined.packing`."""
        module, options = self.seen[self.block]
        assert self.masks is not None
        return self.masks.packed.attend(self.masks.masks, module, (query, key, value), options)


_table: ContextVar[_Table] = ContextVar("compiled pass")


@torch.library.custom_op("hivetune::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _table.get().attend(query, key, value)


@_attend.register_fake
def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Masks | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What a model calls as its attention function: under the compiler, or without it, to be looked at."""
    if attention_mask is None:
        return _attend(query, key, value), None
    table, layer = _table.get(), module.layer_idx
    lasting = {name: value for name, value in options.items() if not _is_of_one_pass(value)}
    table.seen[layer], table.block, table.masks = (module, lasting), layer, attention_mask  # type: ignore[index, assignment]
    return table.attend(query, key, value), None


def _is_of_one_pass(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


class CompiledBlock:
    """A block's forward, compiled."""

    def __init__(self, index: int, block: nn.Module, table: _Table, backend: str):
        self._index, self._table = index, table
        device = next(block.parameters()).device
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self._run = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend, mode=mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        self._table.block = self._index
        return self._run(*map(self._keep_masks, args), **{k: self._keep_masks(v) for k, v in kwargs.items()})

    def _keep_masks(self, value: Any) -> Any:
        """Masks are not for the compiler."""
        if isinstance(value, Masks):
            self._table.masks = value
            return None
        return value


class CompiledPacker(Packer):
    """Runs batched passes without adapters: small ones by compiled blocks, others as `Packer` does."""

    implementation = _NAME

    def __init__(self, span: Span, backend: str):
        super().__init__(span)
        self._backend, self._table = backend, _Table()
        self._compiled = dict[nn.Module, CompiledBlock]()

    def run(self, batch: BatchedPass, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """See `Joiner.run`."""
        if adapted is not None:
            raise ValueError("Compiled blocks run without adapters.")
        blocks = self._compiled if batch.size <= _MOST else {}
        token = _table.set(self._table)
        try:
            with replaced(blocks, self._of):
                if self._span.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                return super().run(batch, mode)
        finally:
            _table.reset(token)
            self._table.masks = None  # with them the sessions' hidden states

    def compile(self) -> None:
        """Have all blocks compiled at their next pass. They must have run once as they are."""
        blocks = self._span.where.of(self._span.model)
        own = ((i, blocks.get_submodule(str(i))) for i in self._span.blocks)
        self._compiled = {block: CompiledBlock(i, block, self._table, self._backend) for i, block in own}

    def _of(self, block: nn.Module, _: Forward) -> Forward:
        return self._compiled[block]


register_attention(_NAME, _attention_forward, packed_mask)
