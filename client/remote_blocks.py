"""The remote blocks as one differentiable function of hidden states, and the pseudo-layer that models run."""

import inspect
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache

from client.adapters import AdapterSource
from client.cache import RemoteLayer, adopt
from client.calls import Trace, run_backward, run_forward
from client.dropout import BlockDropout
from client.ghost import GhostBlocks
from client.loop import LOOP
from client.reach import ReachDependence
from client.session import Session
from client.swarm import Swarm
from client.work import Codecs, Work
from protocol.errors import BadUsage

_REFUSED = {
    "output_attentions": "attention weights stay on the peers",
    "output_hidden_states": "the hidden states between blocks stay on the peers",
    "output_router_logits": "router logits stay on the peers (TRL asks for none with router_aux_loss_coef=0.0)",
}
_NO_BACKWARD = "A backward through an earlier call's cache is not possible; pass use_cache=False."


class RemoteBlocks:
    """Blocks that run on peers: call it on hidden states, for any range, with autograd."""

    def __init__(self, swarm: Swarm, adapters: AdapterSource, ghosts: GhostBlocks, reach: ReachDependence):
        self._swarm, self._adapters, self._ghosts, self._reach = swarm, adapters, ghosts, reach
        self._dropout = BlockDropout(ghosts)

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
        `hidden_states` and the active adapters of these blocks. Raises `BadUsage` for a range that is not there.
        """
        end = len(self) if end is None else end
        if not 0 <= start < end <= len(self):
            raise BadUsage(f"Blocks {start}:{end} do not lie in this model's 0:{len(self)}.")
        work = self.describe(attention_mask, position_ids)
        return self.apply(work, range(start, end), hidden_states)

    def describe(self, mask: torch.Tensor | None, positions: torch.Tensor | None, fresh: bool = True) -> Work:
        """The work for one forward through the model, in the state that it is in now.

        `fresh` False: a decode step in the middle of a generation, see `AdapterSource.snapshot`.
        """
        _check_2d("attention_mask", mask)
        _check_2d("position_ids", positions)
        is_random = self._dropout.is_live()
        adapters = self._adapters.snapshot(fresh, self._ghosts.training or is_random)
        drops = is_random or bool(adapters and adapters.has_dropout)
        if drops and self._dropout and not is_random:
            raise BadUsage(
                "Peers cannot apply dropout of adapters while the blocks' own is off; switch both on or off."
            )
        # Blocks with dropout of their own that is off are sent as in evaluation, where peers leave it out.
        training = drops or (self._ghosts.training and not self._dropout)
        return Work(
            mask=None if mask is None else mask.long(),  # PEFT puts floats before it
            positions=positions,
            training=training,
            dropout_seed=int(torch.randint(2**31, ()).item()) if drops else None,
            autocast=_autocast_dtype(),
            adapters=adapters,
            codecs=Codecs.of(self._swarm.config),
        )

    def apply(self, work: Work, blocks: range, hidden: torch.Tensor) -> torch.Tensor:
        """Take hidden states through `blocks`, differentiably."""
        trained = {}
        if work.adapters:
            own = (name for name in work.adapters.trainable if int(name.partition(".")[0]) in blocks)
            trained = {f"adapter.{name}": work.adapters.tensors[name] for name in own}
        for block, (key, value) in work.prefix.items():
            trained |= {f"prefix.{block}.key": key, f"prefix.{block}.value": value}
        # Asked here: within the function, `needs_input_grad` says the same under `no_grad`.
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *trained.values()))
        return _RemoteCall.apply(self._swarm, work, blocks, keep, tuple(trained), hidden, *trained.values())  # type: ignore[no-any-return]

    def new_session(self) -> Session:
        """A generation over all blocks."""
        return Session(self._swarm, range(len(self)), self._reach)


class _RemoteCall(torch.autograd.Function):
    """Forward on the peers, backward on the peers; the tensors are the adapters' and the prefix's."""

    @staticmethod
    def forward(
        ctx: Any,
        swarm: Swarm,
        work: Work,
        blocks: range,
        keep: bool,
        names: tuple[str, ...],
        hidden: torch.Tensor,
        *tensors: Any,
    ) -> torch.Tensor:
        output, ctx.traces = LOOP.run(run_forward(swarm, _detached(work), blocks, hidden.detach(), keep))
        ctx.swarm, ctx.names = swarm, names
        ctx.like = [(tensor.device, tensor.dtype) for tensor in tensors]
        return output

    @staticmethod
    @once_differentiable  # without it a second backward would take these gradients for constants
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        traces: list[Trace] = ctx.traces
        hidden, gradients = LOOP.run(run_backward(ctx.swarm, traces, grads[0]))
        found = [gradients.get(name) for name in ctx.names]
        cast = [g if g is None else g.to(*like) for g, like in zip(found, ctx.like, strict=True)]
        return None, None, None, None, None, hidden, *cast


class _EarlierCache(torch.autograd.Function):
    """Nobody who decodes with gradients on need switch them off, and nobody gets them without the cache's share."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BadUsage(_NO_BACKWARD)


class PseudoLayer:
    """What the trunk's loop over blocks runs: all of them at once, on the swarm."""

    def __init__(self, remote: RemoteBlocks, ghosts: GhostBlocks):
        self._remote, self._ghosts = remote, ghosts
        self._caught = threading.local()
        """The mask and positions of the forward that runs now, as the user gave them; one per thread."""
        self.returns_tuple = False
        self.probing = True
        """While the trunk is being tried out, hidden states pass through."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_caught"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _caught=threading.local())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def capture(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook on the trunk: the mask and positions as the user gave them.

        Raises `BadUsage` for what remote blocks cannot give.
        """
        if args:
            names = list(inspect.signature(type(trunk).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        refuse_outputs(trunk.config, kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            _check_packing(trunk.config, kwargs.get("position_ids"))
        self._caught.mask, self._caught.positions = kwargs.get("attention_mask"), kwargs.get("position_ids")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.probing:
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            hidden_states = self._run(hidden_states, cache)
        return (hidden_states, None) if self.returns_tuple else hidden_states

    def _run(self, hidden: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        layer, prefix = adopt(cache) if cache is not None else (None, {})
        goes_on = layer is not None and layer.session is not None
        is_decoding = goes_on and hidden.shape[1] == 1  # more at once may be a prompt on a cache from before training
        work = self._remote.describe(self._caught.mask, self._caught.positions, fresh=not is_decoding)
        blocks = range(len(self._remote))
        if layer is None:
            return self._remote.apply(work, blocks, hidden)
        layer.rows = len(hidden)
        if prefix:
            work = replace(work, prefix=prefix)
        is_first = bool(prefix) or not layer.length
        sources = (*layer.sources, *_sources(work, hidden)) if torch.is_grad_enabled() else ()
        if not sources:
            return self._generate(work, hidden, layer)
        if is_first:
            layer.sources = sources
            return self._train(work, blocks, hidden, layer)
        if self._ghosts.training:
            raise BadUsage(_NO_BACKWARD)
        return _EarlierCache.apply(self._generate(work, hidden, layer), *sources)  # type: ignore[no-any-return]

    def _train(self, work: Work, blocks: range, hidden: torch.Tensor, layer: RemoteLayer) -> torch.Tensor:
        """A forward with gradients. Transformers made a cache for it, which is filled only if it comes to be used."""
        layer.length += hidden.shape[1]
        layer.unsent = (_detached(work), hidden.detach())
        return self._remote.apply(work, blocks, hidden)

    def _generate(self, work: Work, hidden: torch.Tensor, layer: RemoteLayer) -> torch.Tensor:
        if layer.session is None:
            layer.session = self._remote.new_session()
            if layer.unsent is not None:
                layer.session.step(*layer.unsent, [], layer.keep_past)
                layer.unsent = None
        output = layer.session.step(_detached(work), hidden.detach(), layer.take_edits(), layer.keep_past)
        layer.length += hidden.shape[1]
        return output


def refuse_outputs(config: Any, asked: Mapping[str, Any]) -> None:
    """Raise `BadUsage` for what remote blocks cannot give, be it asked for in a call or by the configuration."""
    for option, reason in _REFUSED.items():
        wanted = asked.get(option)
        if wanted is None:
            wanted = getattr(config, option, None)
        if wanted is not None and wanted is not False:  # 0 is a hidden state's number
            raise BadUsage(
                f"{option} does not work through a swarm: {reason}; pass {option}=False, or set it so in model.config."
            )


def _sources(work: Work, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What gradients of this work's output would reach."""
    prefix = (tensor for pair in work.prefix.values() for tensor in pair)
    adapters = work.adapters.tensors.values() if work.adapters else ()
    return tuple(tensor for tensor in (hidden, *prefix, *adapters) if tensor.requires_grad)


def _detached(work: Work) -> Work:
    if not work.prefix:
        return work
    prefix = {block: (key.detach(), value.detach()) for block, (key, value) in work.prefix.items()}
    return replace(work, prefix=prefix)


def _autocast_dtype() -> torch.dtype | None:
    """What the user's `torch.autocast` says, on whatever device this machine computes."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def _check_packing(config: Any, positions: torch.Tensor | None) -> None:
    """Where records begin in a packed row is taken from the positions, which say the same as `cu_seq_lens_q`."""
    if positions is None or "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise BadUsage(
            "cu_seq_lens_q does not travel: packed rows need position_ids that begin again with every record, and a "
            "model all of whose layers look at them; switch packing off."
        )


def _check_2d(name: str, tensor: torch.Tensor | None) -> None:
    if tensor is not None and tensor.ndim != 2:
        raise BadUsage(f"{name} has {tensor.ndim} dimensions; through a swarm it must be 2-D, (batch, tokens).")
