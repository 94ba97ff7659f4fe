"""Ghosts: blocks with the right names, shapes and dtypes whose weights live on remote peers.

PEFT, Trainer and generate see an ordinary model. Arithmetic on a ghost raises, except for what DoRA's initialisation
needs of a base weight: its row norms, which a peer computes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from protocol.errors import SwarmError

aten = torch.ops.aten


class RemoteWeightError(SwarmError, RuntimeError):
    """Somebody computed with a weight that is not on this machine."""


NormReader = Callable[[str, bool, tuple[int, ...], torch.dtype], torch.Tensor]
"""(`BLOCK.PATH.weight`, transposed, dimensions, dtype) -> norms."""


@dataclass(frozen=True)
class Source:
    """Where a ghost's values are."""

    name: str
    """`BLOCK.PATH`."""
    read_norm: NormReader


class GhostTensor(torch.Tensor):
    """Shape, dtype and device of a weight on remote peers."""

    source: Source | None
    transposed: bool

    @staticmethod
    def __new__(
        cls, like: torch.Tensor, source: Source | None, transposed: bool = False, dtype: torch.dtype | None = None
    ) -> "GhostTensor":
        flipped = transposed != getattr(like, "transposed", False)
        shape = like.shape[::-1] if flipped else like.shape
        ghost: Any = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype or like.dtype, device=torch.device("cpu")
        )
        ghost.source, ghost.transposed = source, transposed
        return ghost  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GhostTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "GhostTensor":
        twin = GhostTensor(self, self.source, self.transposed)
        if not isinstance(self, nn.Parameter):
            return twin
        parameter: Any = nn.Parameter(twin, self.requires_grad)
        parameter.source, parameter.transposed = self.source, self.transposed
        return parameter  # type: ignore[no-any-return]

    def element_size(self) -> int:
        """Bytes that an element takes on this machine."""
        return 0

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        ghost, rest = args[0], args[1:]
        if isinstance(ghost, cls):
            if func in (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default):
                return cls(ghost, ghost.source, ghost.transposed, (kwargs or {}).get("dtype"))
            if func in (aten.t.default, aten.transpose.int, aten.permute.default) and ghost.ndim == 2:
                return cls(ghost, ghost.source, not ghost.transposed)
            if func is aten.add.Tensor and not isinstance(rest[0], cls) and not torch.as_tensor(rest[0]).any():
                return cls(ghost, ghost.source, ghost.transposed, torch.promote_types(ghost.dtype, rest[0].dtype))
            if func is aten.linalg_vector_norm.default and ghost.source and rest[0] == 2:
                return ghost.source.read_norm(ghost.source.name, ghost.transposed, tuple(rest[1]), ghost.dtype)
        raise RemoteWeightError(
            f"{func} needs a weight of the transformer blocks, and this weight lives on remote peers; "
            "only adapters and what lies outside of the blocks can be computed with on this machine."
        )


class GhostBlocks(nn.ModuleList):
    """The block list: named modules show every block, iteration shows one pseudo-layer that calls the swarm."""

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


def make_ghosts(blocks: nn.ModuleList, read_norm: NormReader) -> GhostBlocks:
    """Ghosts of `blocks`, which are on the meta device and are changed in place."""
    for index, block in blocks._modules.items():
        assert block is not None
        for path, module in block.named_modules():
            prefix = f"{index}.{path}." if path else f"{index}."
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    ghost = GhostTensor(parameter, Source(prefix + name, read_norm))
                    module._parameters[name] = nn.Parameter(ghost, requires_grad=False)
                    module._parameters[name].source = ghost.source  # type: ignore[union-attr]
                    module._parameters[name].transposed = False  # type: ignore[union-attr]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = GhostTensor(buffer, None)
    return GhostBlocks(blocks._modules.values())
