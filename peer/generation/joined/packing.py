"""A batched pass by packing: one row of all sessions' tokens.

The tokens are laid end to end as one row, so that everything that works on tokens one by one (linear layers, norms,
experts) runs once over all of them. Only attention is done session by session: on the session's own cache, with the
mask that Transformers would make for it alone, by the attention function that the model would use.
"""

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peer.generation.joined.appending import Appender
from peer.generation.joined.batched_pass import BatchedPass, BatchMember
from peer.span.span import Adapted, Inputs, Mode, Span
from peer.span.transfer import to_device, to_host
from protocol.model.anatomy import configurations
from protocol.model.forwards import attention, register_attention

_NAME = "hivetune_packed"


@dataclass
class _Packed:
    """A batched pass under way."""

    batch: BatchedPass
    implementation: str
    """The name of the model's own attention function."""
    layer: int = 0
    """The layer for which the trunk is making a mask."""
    appender: Appender = field(init=False)

    def __post_init__(self) -> None:
        self.appender = Appender(self.batch.members)

    def make_masks(self, arguments: dict[str, Any]) -> "Masks":
        """What the model's own mask function makes for each member alone.

        `arguments`: what the trunk gives a mask function, for the whole row.
        """
        make = ALL_MASK_ATTENTION_FUNCTIONS[self.implementation]
        masks = [each.attempt(lambda: make(**self._of_member(each, arguments))) for each in self.batch.members]  # noqa: B023
        return Masks(self, masks)

    def _of_member(self, member: BatchMember, arguments: dict[str, Any]) -> dict[str, Any]:
        kv_length, kv_offset = member.cache.get_mask_sizes(member.tokens, self.layer)
        mask = member.inputs.mask
        return arguments | {
            "batch_size": member.rows,
            "q_length": member.tokens,
            "kv_length": kv_length,
            "q_offset": member.cache.get_query_offset(self.layer),
            "kv_offset": kv_offset,
            "attention_mask": None if mask is None else to_device(mask, arguments["device"], torch.bool),
        }

    def attend(
        self, masks: Sequence[torch.Tensor | None], module: nn.Module, qkv: Sequence[torch.Tensor], options: Any
    ) -> torch.Tensor:
        """(1, all tokens, heads, head size) from queries, keys and values (1, heads, all tokens, head size)."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, _eager_attention(module))
        layer: Any = module.layer_idx
        self.batch.has_begun = True
        members = self.batch.members
        sizes = [member.size for member in members]
        written = {"written": True} if self.appender.write(layer, *qkv[1:]) else {}

        def attend(member: BatchMember, mask: torch.Tensor | None, packed: Sequence[torch.Tensor]) -> torch.Tensor:
            query, key, value = (_unpack(member, states) for states in packed)
            key, value = member.cache.update(key, value, layer, **written)
            output: torch.Tensor = function(module, query, key, value, mask, **options)[0]
            return output.reshape(1, -1, *output.shape[2:])

        outputs = []
        for member, mask, *packed in zip(members, masks, *(states.split(sizes, 2) for states in qkv), strict=True):
            output = member.attempt(lambda: attend(member, mask, packed))  # noqa: B023
            if output is None:  # its tokens mean nothing any more, but keep their place
                query, _, value = packed
                output = query.new_zeros(1, member.size, query.shape[1], value.shape[3])
            outputs.append(output)
        return torch.cat(outputs, 1)


@dataclass(frozen=True)
class Masks:
    """Every member's mask. Goes through the trunk in the place of a mask."""

    packed: _Packed
    masks: Sequence[torch.Tensor | None]


class _PackedCache(Cache):
    """Goes through the trunk in the place of a cache: it lets keys and values pass, and attention caches them."""

    def __init__(self, packed: _Packed, kinds: Cache):
        super().__init__(layers=kinds.layers)
        self._packed = packed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self._packed.layer = layer_idx
        return query_length, 0


_current: ContextVar[_Packed] = ContextVar("packed pass")


class Packer:
    """Runs batched passes on a span by packing."""

    implementation = _NAME
    """The name of the attention function that the model calls during a pass."""

    def __init__(self, span: Span):
        self._span = span
        # From the trunk down: setting a configuration's attention sets that of its parts.
        self._configs: list[Any] = configurations(span.model)
        self._kinds = DynamicCache(config=span.config)
        """Always empty: it only tells of which kind each layer is."""

    def run(self, batch: BatchedPass, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """See `Joiner.run`."""
        packed = _Packed(batch, self._span.config._attn_implementation)
        positions = torch.cat([_positions(member) for member in batch.members], 1)
        inputs, cache = Inputs(batch.row(), None, positions), _PackedCache(packed, self._kinds)
        token = _current.set(packed)
        try:
            with attention(self._configs, self.implementation):
                return batch.split(to_host(self._span.run(inputs, mode, cache, adapted)))
        finally:
            _current.reset(token)


def _positions(member: BatchMember) -> torch.Tensor:
    """(1, rows x tokens): as the user gave them, else counted on from the cache, as a trunk does."""
    given = member.inputs.positions
    if given is None:
        past = member.cache.get_seq_length()
        given = torch.arange(past, past + member.tokens)[None]
    return given.expand(member.rows, -1).reshape(1, -1)


def _unpack(member: BatchMember, states: torch.Tensor) -> torch.Tensor:
    """(rows, heads, tokens, head size) of a member's place (1, heads, size, head size) in packed states."""
    return states if member.rows == 1 else states[0].unflatten(1, (member.rows, member.tokens)).transpose(0, 1)


def _eager_attention(module: nn.Module) -> Any:
    """Eager attention is no entry of Transformers' table but a function next to the model's classes."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _packed_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Masks,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What a model calls as its attention function during a packed pass."""
    return attention_mask.packed.attend(attention_mask.masks, module, (query, key, value), options), None


def packed_mask(**arguments: Any) -> Masks:
    """What a trunk calls to make a mask during a packed pass."""
    return _current.get().make_masks(arguments)


register_attention(_NAME, _packed_attention_forward, packed_mask)
