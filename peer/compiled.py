"""Decode steps of compiled code: a span's blocks by `torch.compile`, each one graph, on a GPU with CUDA graphs.

Attention goes through an operation that the compiler does not look into. It works on the sessions' caches, which lie
somewhere else and are longer at every step; everything around it sees nothing but some tokens end to end, as in every
packed call. So there are two graphs per kind of block, one for a single token and one for any number, and all blocks
of a kind share them. CUDA graphs end before the operation and begin again after it (piecewise, as in vLLM).
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch._inductor.config
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from peer.joint import JointCall, Part
from peer.kv_cache import SpanCache
from peer.packing import Masks, Packer, packed_mask
from peer.packing_check import tolerance
from peer.span import Adapted, Inputs, Mode, Span
from protocol.errors import first_line

logger = logging.getLogger(__name__)

_NAME = "swarmtune_compiled"
_MOST = 64
"""Tokens in one call that gain by it: with more the products take nearly all of the time."""
_PAYS = 1.02
"""How many times as fast a step must be."""
_ROUNDS = 10


class _Table:
    """What attention needs to know of a packed call beside its queries, keys and values."""

    def __init__(self) -> None:
        self.seen = dict[int, tuple[nn.Module, dict[str, Any]]]()
        """Block -> its attention module, and how it calls attention functions."""
        self.block = 0
        """The one that is running, and its masks."""
        self.masks: Masks | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(1, all tokens, heads, head size): see `peer.packing`; of the block that is running."""
        module, options = self.seen[self.block]
        assert self.masks is not None
        return self.masks.packed.attend(self.masks.masks, module, (query, key, value), options)


_table: ContextVar[_Table] = ContextVar("compiled call")


@torch.library.custom_op("swarmtune::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
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
    """What a model calls as its attention function, under the compiler or, to be looked at, without."""
    if attention_mask is None:
        return _attend(query, key, value), None
    table, layer = _table.get(), module.layer_idx
    lasting = {name: value for name, value in options.items() if not _is_of_one_call(value)}
    table.seen[layer], table.block, table.masks = (module, lasting), layer, attention_mask  # type: ignore[index, assignment]
    return table.attend(query, key, value), None


def _is_of_one_call(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


class _Block:
    """Stands in for a block of the span."""

    def __init__(self, index: int, block: nn.Module, table: _Table, backend: str):
        self._index, self._block, self._table = index, block, table
        device = next(block.parameters()).device
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        self._run = torch.compile(block, fullgraph=True, dynamic=True, backend=backend, mode=mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._table.block = self._index
        return self._run(*map(self._keep_masks, args), **{k: self._keep_masks(v) for k, v in kwargs.items()})

    def _keep_masks(self, value: Any) -> Any:
        """Masks are not for the compiler."""
        if isinstance(value, Masks):
            self._table.masks = value
            return None
        return value


class CompiledPacker(Packer):
    """Runs packed calls on a span whose own adapters are all there is: small ones by compiled blocks."""

    implementation = _NAME

    def __init__(self, span: Span, backend: str):
        super().__init__(span)
        self._backend, self._table = backend, _Table()
        self._compiled = dict[int, Any]()

    def run(self, call: JointCall, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """See `Joiner.run`."""
        if adapted is not None:
            raise ValueError("Compiled blocks run without adapters.")
        stand_ins = self._compiled if call.size <= _MOST else {}
        token = _table.set(self._table)
        try:
            with self._span.standing_in(stand_ins):
                if self._span.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                return super().run(call, mode)
        finally:
            _table.reset(token)
            self._table.masks = None  # with them the sessions' hidden states

    def compile(self) -> None:
        """Have all blocks compiled at their next call. Once they have been run as they are."""
        blocks = self._span.where.of(self._span.model)
        self._compiled = {
            i: _Block(i, blocks.get_submodule(str(i)), self._table, self._backend) for i in self._span.blocks
        }


@torch.no_grad()
def compile_steps(span: Span, backend: str = "inductor") -> CompiledPacker | None:
    """A packer of compiled steps, if they give what the span gives, and sooner. Takes half a minute, or minutes."""
    compiled = CompiledPacker(span, backend)
    try:
        with _settings():
            error, gain = _try_out(span, Packer(span), compiled)
    except Exception as failure:  # any failure at all: no compiler, or a block that it cannot take
        logger.warning("steps are not compiled: %s", first_line(failure))
        return None
    if not error <= tolerance(span) or gain < _PAYS:
        logger.warning("steps are not compiled: they differ by %.1e and are %.2f times as fast", error, gain)
        return None
    logger.info("steps are compiled: %.2f times as fast", gain)
    return compiled


@contextmanager
def _settings() -> Iterator[None]:
    # Otherwise a block's number would be part of its graph, and each block have its own. And CUDA graphs are for single
    # tokens: each further number of them would be recorded, and keep memory, while clients wait.
    dynamo = torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)  # type: ignore[attr-defined]
    with dynamo, torch._inductor.config.patch({"triton.cudagraph_skip_dynamic_graphs": True}):
        yield


def _try_out(span: Span, plain: Packer, compiled: CompiledPacker) -> tuple[float, float]:
    """The largest relative difference of a few steps, and how many times as fast a step of one token is."""
    mode, chance = Mode(span.blocks), torch.Generator().manual_seed(0)
    caches = {packer: SpanCache(span.model.config, span.blocks) for packer in (plain, compiled)}

    def step(packer: Packer, hidden: torch.Tensor) -> torch.Tensor:
        (found,) = packer.run(JointCall([Part(Inputs(hidden), caches[packer])]), mode)
        caches[packer].seen += hidden.shape[1]
        return found

    worst, times = 0.0, dict[Packer, list[float]]({plain: [], compiled: []})
    for number, tokens in enumerate([5, 1, 3] + [1] * _ROUNDS):
        hidden = torch.randn(1, tokens, span.hidden_size, generator=chance).to(span.device, span.dtype)
        found = {}
        for packer in (plain, compiled):
            begin = time.perf_counter()
            found[packer] = step(packer, hidden)
            times[packer].append(time.perf_counter() - begin)
        error = (found[compiled] - found[plain]).abs().max() / found[plain].abs().max()
        worst = max(worst, float(error.nan_to_num(float("inf"))))
        if number == 0:
            compiled.compile()
    fastest = {packer: min(taken[-_ROUNDS:]) for packer, taken in times.items()}
    return worst, fastest[plain] / fastest[compiled]


AttentionInterface.register(_NAME, _attention_forward)
AttentionMaskInterface.register(_NAME, packed_mask)  # type: ignore[arg-type]
