"""The remote blocks as one differentiable function of hidden states."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from client.adapters.dropout import BlockDropout
from client.adapters.source import AdapterSource
from client.generation.dynamic_rope import DynamicRope
from client.generation.session import InferenceSession
from client.ghosts.blocks import GhostBlocks
from client.model.crossing import enter, leave, to_host_memory
from client.requests.caller import Caller
from client.requests.work import Codecs, Work
from client.training.micro_batches import Trace, TrainingCalls
from protocol.errors import BadUsage


class RemoteBlocks:
    """Blocks that run on peers: call it on hidden states, for any range, with autograd."""

    def __init__(self, caller: Caller, adapters: AdapterSource, ghosts: GhostBlocks, rope: DynamicRope):
        self.training = TrainingCalls(caller)
        self._caller, self._adapters, self._ghosts, self._rope = caller, adapters, ghosts, rope
        self._dropout = BlockDropout(ghosts)
        self._has_dropout = bool(self._dropout)
        self._codecs = Codecs.of(caller.swarm.config)

    def __len__(self) -> int:
        return len(self._ghosts)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        start: int = 0,
        end: int | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after blocks [start, end), in the dtype that they came in.

        `attention_mask` (batch, tokens) and `position_ids` (batch or 1, tokens) as for the whole model. Gradients reach
        `hidden_states` and the active adapters of these blocks. Raises `BadUsage` for a range that is not there and
        for hidden states of another shape.
        """
        check_hidden(hidden_states)
        end = len(self) if end is None else end
        if not 0 <= start < end <= len(self):
            raise BadUsage(f"Blocks {start}:{end} do not lie in this model's 0:{len(self)}.")
        work = self.describe(attention_mask, position_ids)
        return self.apply(work, range(start, end), hidden_states, to_host_memory(work, hidden_states))

    def describe(self, mask: torch.Tensor | None, positions: torch.Tensor | None, fresh: bool = True) -> Work:
        """The work for one forward through the model, in the state that it is in now.

        `fresh` False: a decode step in the middle of a generation, see `AdapterSource.snapshot`.
        """
        _check_2d("attention_mask", mask)
        _check_2d("position_ids", positions)
        autocast, is_random = _autocast_dtype(), self._has_dropout and self._dropout.is_live()
        adapters = self._adapters.snapshot(fresh, self._ghosts.training or is_random)
        drops = is_random or bool(adapters and adapters.has_dropout)
        if drops and self._has_dropout and not is_random:
            raise BadUsage(
                "Peers cannot apply dropout of adapters while the blocks' own is off; switch both on or off."
            )
        # Blocks with dropout of their own that is off are sent as in evaluation, where peers leave it out.
        training = drops or (self._ghosts.training and not self._has_dropout)
        return Work(
            mask=None if mask is None else mask.long(),  # PEFT puts floats before it
            positions=positions,
            training=training,
            dropout_seed=int(torch.randint(2**31, ()).item()) if drops else None,
            autocast=autocast,
            adapters=adapters,
            codecs=self._codecs,
        )

    def apply(self, work: Work, blocks: range, hidden: torch.Tensor, host: tuple[Work, torch.Tensor]) -> torch.Tensor:
        """Take hidden states through `blocks`, differentiably. `host`: what `to_host_memory` has made of these."""
        trained, copies = dict[str, torch.Tensor](), [host[1]]
        if work.adapters:
            for name in work.adapters.trainable:
                if int(name.partition(".")[0]) in blocks:
                    trained[f"adapter.{name}"] = work.adapters.tensors[name]
                    copies.append(work.adapters.in_host_memory(name))
        for block, (key, value) in work.prefix.items():
            trained |= {f"prefix.{block}.key": key, f"prefix.{block}.value": value}
            copies += host[0].prefix[block]
        given = (hidden, *trained.values())
        # Asked here: within the function, `needs_input_grad` says the same under `no_grad`.
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        output = _RemoteCall.apply(self.training, host[0], blocks, keep, tuple(trained), *enter(given, copies))
        return leave(output, hidden.device)

    def new_session(self, blocks: range) -> InferenceSession:
        """A generation over some blocks."""
        return InferenceSession(self._caller, blocks, self._rope)


class _RemoteCall(torch.autograd.Function):
    """Forward on the peers, backward on the peers; the tensors are the adapters' and the prefix's, in host memory."""

    @staticmethod
    def forward(
        ctx: Any,
        training: TrainingCalls,
        work: Work,
        blocks: range,
        keep: bool,
        names: tuple[str, ...],
        hidden: torch.Tensor,
        *tensors: Any,
    ) -> torch.Tensor:
        output, ctx.traces = training.loop.run(training.forward(work, blocks, hidden.detach(), keep))
        ctx.training, ctx.names = training, names
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return output

    @staticmethod
    @once_differentiable  # without it a second backward would take these gradients for constants
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        traces: list[Trace] = ctx.traces
        hidden, gradients = ctx.training.loop.run(ctx.training.backward(traces, grads[0]))
        found = [gradients.get(name) for name in ctx.names]
        cast = [g if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)]
        return None, None, None, None, None, hidden, *cast


def _autocast_dtype() -> torch.dtype | None:
    """What the user's `torch.autocast` says, on whatever device this machine computes."""
    for device in ("cuda", "cpu", "xpu", "mps"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def check_hidden(hidden: torch.Tensor) -> None:
    """Raise `BadUsage` for what are not hidden states (batch, tokens, hidden size) of one token or more."""
    if hidden.ndim != 3 or not hidden.numel():
        raise BadUsage(
            f"Hidden states have the shape {list(hidden.shape)}; expected (batch, tokens, hidden size) and at least "
            "one token, as input_ids (batch, tokens) give them."
        )


def _check_2d(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None and getattr(tensor, "ndim", None) != 2:
        found = f"has {tensor.ndim} dimensions" if isinstance(tensor, torch.Tensor) else f"is a {type(tensor).__name__}"
        raise BadUsage(f"{name} {found}; through a swarm it must be 2-D, (batch, tokens).")
