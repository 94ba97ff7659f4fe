"""The ghosts of all blocks, in the place of a model's own list of blocks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from client.ghosts.questions import WeightReader
from client.ghosts.tensor import GhostTensor, Source
from protocol.errors import BadUsage


class Layer(Protocol):
    """What runs blocks, all of a range at once."""

    def __call__(self, blocks: range, hidden_states: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """As a block of the trunk is called, and with what the trunk expects of a block as the result."""

    @property
    def whole(self) -> "BlockRange":
        """All blocks."""

    @property
    def active_session(self) -> Any:
        """The session that is in use in this thread, if it is one of these blocks."""

    def run(self, blocks: range, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after `blocks`."""

    def step(self, blocks: range, hidden_states: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The same, of tokens that come behind those of `cache`."""

    def inference_session(self, blocks: range) -> AbstractContextManager[Any]:
        """A session over `blocks`, for the time of the block."""


class BlockRange:
    """Consecutive blocks: iterated, one layer that runs them all, as a trunk runs its blocks; or called as they are."""

    def __init__(self, layer: Layer, blocks: range):
        self._layer, self.blocks = layer, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Any]:
        return iter([partial(self._layer, self.blocks)] if self.blocks else [])

    def __getitem__(self, index: slice) -> "BlockRange":
        blocks = self.blocks[index]
        if blocks.step != 1:
            raise BadUsage("Remote blocks run in their order; take a range of them without a step.")
        return BlockRange(self._layer, blocks)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after these blocks, with autograd; in a session, on its caches."""
        return self._layer.run(self.blocks, hidden_states)

    def inference_session(self, *, max_length: int | None = None) -> AbstractContextManager[Any]:
        """See `client.model.petals`."""
        return self._layer.inference_session(self.blocks)


class GhostBlocks(nn.ModuleList):
    """The model's list of blocks. As a module it shows every block; a slice of it is a `BlockRange`, and so is all.

    Trunks take `config.num_hidden_layers` of their blocks by a slice.
    """

    _layer: Layer

    def attach(self, layer: Layer) -> None:
        """Make `layer` what runs the blocks."""
        object.__setattr__(self, "_layer", layer)  # not a submodule

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return BlockRange(self._layer, range(len(self)))[index]
        return self._modules[str(index % len(self._modules))]

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `BlockRange`."""
        return self[:](hidden_states)  # type: ignore[no-any-return]

    @property
    def active_session(self) -> Any:
        """See `client.model.petals`."""
        return self._layer.active_session

    def inference_session(self, *, max_length: int | None = None) -> AbstractContextManager[Any]:
        """See `client.model.petals`."""
        return self[:].inference_session(max_length=max_length)  # type: ignore[no-any-return]


def matrix_names(blocks: nn.ModuleList) -> frozenset[str]:
    """The weights that peers may be asked about: parameters of two dimensions, `BLOCK.PATH`."""
    return frozenset(name for name, parameter in blocks.named_parameters() if parameter.ndim == 2)


def make_ghosts(blocks: nn.ModuleList, reader: WeightReader) -> GhostBlocks:
    """Put ghosts in the place of all parameters and buffers of `blocks`, which are on the meta device."""
    for index, block in blocks._modules.items():
        assert block is not None
        for path, module in block.named_modules():
            prefix = f"{index}.{path}." if path else f"{index}."
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    ghost = GhostTensor(parameter, Source(prefix + name, reader))
                    module._parameters[name] = nn.Parameter(ghost, requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = GhostTensor(buffer, None)
    return GhostBlocks(blocks._modules.values())
