"""Cutting a model down to a span, and the block list that skips the blocks which are not to run.

What is cut away is replaced by modules that pass hidden states on, so the model's own code runs as it is.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from protocol.model.anatomy import BlockList, find_blocks


class Skip(nn.Module):
    """A block that is not run: hidden states pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.returns_tuple = False

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`hidden_states`, in the form in which this architecture's blocks return them. No hooks are run."""
        return (hidden_states, None) if self.returns_tuple else hidden_states


class _Zero(nn.Module):
    """A position embedding that adds nothing: the client has added it already."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = (value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return torch.zeros((), device=next(given, None))  # from another device it would be copied, and waited for


class SpanBlocks(nn.ModuleList):
    """The block list, in which only the `active` blocks are run. Every block keeps its absolute index."""

    active: range
    skip: tuple[Skip]  # in a tuple: not a submodule

    def _listed(self) -> list[Any]:
        blocks, (start, end) = list(self._modules.values()), (self.active.start, self.active.stop)
        return [*self.skip * start, *blocks[start:end], *self.skip * (len(blocks) - end)]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._listed())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._listed()[index]
        index = index % len(self)
        return self._modules[str(index)] if index in self.active else self.skip[0]


def cut_to_span(model: PreTrainedModel, start: int, end: int) -> BlockList:
    """Remove from a model under construction everything but blocks [start, end) and what its trunk needs to run them.

    Rotary embeddings stay; embeddings and learned positions become zero; everything else becomes the identity.
    """
    where = find_blocks(model)
    trunk, skip = where.trunk_of(model), Skip()
    blocks = SpanBlocks(block if start <= i < end else skip for i, block in enumerate(where.of(model)))
    blocks.active, blocks.skip = range(start, end), (skip,)
    for name, child in list(trunk.named_children()):
        kind = f"{name} {type(child).__name__}".lower()
        if name == where.attribute:
            setattr(trunk, name, blocks)
        elif isinstance(child, nn.Embedding) or ("position" in kind and "rotary" not in kind):
            setattr(trunk, name, _Zero())
        elif "rotary" not in kind and "rope" not in kind:
            setattr(trunk, name, nn.Identity())
    for module, kept in where.around(model):
        for name in {name for name, _ in module.named_children()} - {kept}:
            setattr(module, name, nn.Identity())
    model.tie_weights = lambda *args, **kwargs: None  # type: ignore[method-assign]
    model.all_tied_weights_keys = {}
    return where


def neutralise_scalars(model: nn.Module) -> None:
    """Have the trunk not scale its inputs, as Granite's and its relatives' do: the client has done that already."""
    for module in model.modules():
        if hasattr(module, "embedding_multiplier"):
            module.embedding_multiplier = 1.0  # type: ignore[assignment]
