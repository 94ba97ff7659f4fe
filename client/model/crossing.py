"""The way between a user's device and what takes hidden states through the swarm, all of which is in host memory.

Both crossings are made by the calling thread and on its current stream: one wait for all that goes out, none for what
comes back. What lies in between is on the CPU for autograd too. So a backward asks peers from the thread that called
it, which Ctrl-C reaches, and not from autograd's own thread for the device.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from client.requests.work import Work
from protocol.machine.transfer import copy_to, to_devices, to_host


def to_host_memory(work: Work, hidden: torch.Tensor) -> tuple[Work, torch.Tensor]:
    """A work and its hidden states in host memory, without a way back for gradients.

    Adapters' tensors that are on a device are copied along, once for all that is done with a snapshot of them.
    """
    prefix = [tensor for pair in work.prefix.values() for tensor in pair]
    optional = [tensor for tensor in (work.mask, work.positions) if tensor is not None]
    uncopied = work.adapters.uncopied() if work.adapters else ()
    copies = iter(to_host([tensor.detach() for tensor in (hidden, *optional, *prefix, *uncopied)]))
    hidden = next(copies)
    mask, positions = (None if tensor is None else next(copies) for tensor in (work.mask, work.positions))
    pairs = {block: (next(copies), next(copies)) for block in work.prefix}
    if work.adapters:
        work.adapters.take_copies(copies)
    return replace(work, mask=mask, positions=positions, prefix=pairs), hidden


def enter(tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """`copies` of tensors in host memory, differentiably; the tensors themselves where all are there."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return tensors
    return _Enter.apply(copies, *tensors)  # type: ignore[no-any-return]


def leave(hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Hidden states from host memory on a device, differentiably."""
    return hidden if device.type == "cpu" else _Leave.apply(hidden, device)  # type: ignore[no-any-return]


class _Enter(torch.autograd.Function):
    """To host memory, where the copies are already; the gradients come back from there."""

    @staticmethod
    def forward(ctx: Any, copies: Sequence[torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.devices = [tensor.device for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        wanted = {
            index: grad for index, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[index + 1]
        }
        there = to_devices(list(wanted.values()), [ctx.devices[index] for index in wanted])
        found = dict(zip(wanted, there, strict=True))
        return None, *(found.get(index) for index in range(len(grads)))


class _Leave(torch.autograd.Function):
    """To a device; the gradient comes into host memory."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        return copy_to(hidden, device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *to_host(grads), None
