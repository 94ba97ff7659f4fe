"""The ghosts of all blocks, in the place of a model's own list of blocks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from client.ghosts.questions import WeightReader
from client.ghosts.tensor import GhostTensor, Source
from protocol.errors import BadUsage


class GhostBlocks(nn.ModuleList):
    """The model's list of blocks. As a module it shows every block; iterated, one layer that runs all on the swarm.

    So is a slice of it, of which the layer runs those blocks: trunks take `config.num_hidden_layers` of their blocks.
    """

    def attach(self, layer: Callable[..., Any]) -> None:
        """Make `layer` what a forward through this list runs: it is called with a range of blocks, then as a block."""
        object.__setattr__(self, "_layer", layer)  # not a submodule

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self._modules[str(index % len(self._modules))]
        blocks = range(len(self))[index]
        if blocks.step != 1:
            raise BadUsage("Remote blocks run in their order; take a range of them without a step.")
        return [partial(self._layer, blocks)] if blocks else []

    def __len__(self) -> int:
        return len(self._modules)


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
