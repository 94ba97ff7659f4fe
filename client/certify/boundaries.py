"""The boundaries between spans of a local model: where tensors would cross the wire, they are coded and decoded.

With n spans there are n + 1 boundaries: before each span, and after the last one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from protocol.codecs import NAMES
from protocol.errors import BadUsage
from protocol.model.anatomy import find_blocks
from protocol.tensors import decode, encode


class Boundaries:
    """Codes and decodes the hidden states of a local model, and their gradients, at the boundaries of its spans."""

    def __init__(self, model: PreTrainedModel, spans: int):
        blocks = find_blocks(model).of(model)
        if spans > len(blocks):
            raise BadUsage(f"--spans {spans} is more than the model's {len(blocks)} blocks.")
        self._codec = self._gradients = "none"
        self.values = self.bytes = 0
        """Values that have crossed forward under the codec in use, and the bytes that they took."""
        for number in range(spans):
            blocks[len(blocks) * number // spans].register_forward_pre_hook(self._before, with_kwargs=True)
        blocks[-1].register_forward_hook(self._after)

    @contextmanager
    def using(self, codec: str, gradients: str = "none") -> Iterator[None]:
        """Within the block, hidden states travel under `codec` and their gradients under `gradients`."""
        self._codec, self._gradients, self.values, self.bytes = codec, gradients, 0, 0
        try:
            yield
        finally:
            self._codec = self._gradients = "none"

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self._cross(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._cross(kwargs["hidden_states"])}

    def _after(self, block: nn.Module, args: Any, output: Any) -> Any:
        return self._cross(output) if isinstance(output, torch.Tensor) else (self._cross(output[0]), *output[1:])

    def _cross(self, hidden: torch.Tensor) -> torch.Tensor:
        crossed: torch.Tensor = _Crossing.apply(hidden, self)  # type: ignore[no-untyped-call]
        return crossed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as they arrive."""
        entry, data = encode("hidden_states", hidden, NAMES[self._codec])
        self.values, self.bytes = self.values + hidden.numel(), self.bytes + data.nbytes
        return decode([entry], bytearray(data))["hidden_states"].to(hidden.device)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Their gradient as it arrives."""
        entry, data = encode("grad", grad, NAMES[self._gradients])
        return decode([entry], bytearray(data))["grad"].to(grad.device)


class _Crossing(torch.autograd.Function):
    """The way over the wire and, in a backward, back."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, boundaries: Boundaries) -> torch.Tensor:
        ctx.boundaries = boundaries
        return boundaries.forward(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.boundaries.backward(grads[0]), None
