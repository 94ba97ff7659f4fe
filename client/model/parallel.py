"""Several processes, each with a client of its own, that train one adapter together.

DistributedDataParallel, which `Trainer` and accelerate use too, begins by sending every parameter and buffer of the
first process to the others, but for those whose names it is given. Ghosts have nothing to send, and their names change
with whatever is put around the model: PEFT, a compiled module, a module of the user's. So they are found where they are
needed, in DistributedDataParallel's constructor. What PiSSA or OLoRA subtracted from a weight is sent in its place.

DataParallel, by which `Trainer` uses several GPUs in one process, copies a model to each of them, and is refused.
"""

from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from client.ghosts.blocks import ghost_names
from client.ghosts.questions import Subtracted
from client.ghosts.tensor import GhostTensor
from protocol.errors import BadUsage

_CONSTRUCT, _CONSTRUCT_COPIES = DistributedDataParallel.__init__, DataParallel.__init__


def leave_out_ghosts() -> None:
    """Have DistributedDataParallel leave ghosts out of any module that it wraps in this process; DataParallel refuses
    one that has any."""
    DistributedDataParallel.__init__ = _construct  # type: ignore[method-assign]
    DataParallel.__init__ = _construct_copies  # type: ignore[method-assign]


@wraps(_CONSTRUCT_COPIES)
def _construct_copies(self: DataParallel[Any], module: nn.Module, *args: Any, **kwargs: Any) -> None:
    _CONSTRUCT_COPIES(self, module, *args, **kwargs)
    if len(self.device_ids) > 1 and any(ghost_names(module)):
        raise BadUsage(
            "DataParallel, which Trainer takes where it sees several GPUs, copies a model to each of them, and the "
            "blocks of this one are on peers; show it one GPU (CUDA_VISIBLE_DEVICES=0), or start a process for each "
            "GPU with torchrun or accelerate launch."
        )


@wraps(_CONSTRUCT)
def _construct(self: DistributedDataParallel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    if ghosts := set(ghost_names(module)):
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ghosts.union(ignored))
    _CONSTRUCT(self, module, *args, **kwargs)
    if kwargs.get("init_sync", True):
        _share_subtracted(self)


def _share_subtracted(wrapped: DistributedDataParallel) -> None:
    """Processes may have drawn different factors of a weight; the adapters are the first one's now."""

    def share(tensor: torch.Tensor) -> torch.Tensor:
        shared = tensor.to(wrapped.device, copy=True)  # where the backend takes it from
        dist.broadcast(shared, group=wrapped.process_group, group_src=0)
        return shared.to(tensor.device)

    for ghost in wrapped.module.parameters():
        if isinstance(ghost, GhostTensor) and ghost.subtracted is not None:
            ghost.subtracted = Subtracted(share(ghost.subtracted.b), share(ghost.subtracted.a))
