"""The ghosts of all blocks, in the place of a model's own list of blocks."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from client.ghosts.questions import WeightReader
from client.ghosts.tensor import GhostTensor, Source


class GhostBlocks(nn.ModuleList):
    """The model's list of blocks. As a module it shows every block; iterated, one layer that runs all on the swarm."""

    def attach(self, layer: Callable[..., Any]) -> None:
        """Make `layer` what a forward through this list runs."""
        object.__setattr__(self, "_layer", layer)  # not a submodule

    def __iter__(self) -> Iterator[Any]:
        return iter([self._layer])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._layer]
        return self._modules[str(index % len(self._modules))]

    def __len__(self) -> int:
        return len(self._modules)


def matrix_names(blocks: nn.ModuleList) -> frozenset[str]:
    """The weights that peers may be asked about: parameters of two dimensions, `BLOCK.PATH`."""
    return frozenset(name for name, parameter in blocks.named_parameters() if parameter.ndim == 2)


def ghost_names(module: nn.Module) -> Iterator[str]:
    """The parameters and buffers of `module` whose values are on remote peers, by their names in it."""
    members = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return (name for name, tensor in members if isinstance(tensor.data, GhostTensor))


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
