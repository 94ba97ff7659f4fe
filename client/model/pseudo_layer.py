"""What a trunk runs in the place of its blocks: one layer that takes hidden states through the swarm."""

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from client.ghosts.blocks import BlockRange, GhostBlocks
from client.model.crossing import leave, to_host_memory
from client.model.petals import PetalsSession, active_session, new_session
from client.model.remote_blocks import RemoteBlocks, check_hidden
from client.model.remote_cache import RemoteLayer, adopt
from client.requests.work import Work
from protocol.errors import BadUsage
from protocol.tensors import KvPrefix

T = TypeVar("T")

_REFUSED = {
    "output_attentions": "attention weights stay on the peers",
    "output_hidden_states": "the hidden states between blocks stay on the peers",
    "output_router_logits": "router logits stay on the peers (TRL asks for none with router_aux_loss_coef=0.0)",
}
"""Options of a forward, and why the swarm cannot do them."""
_TEXT = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "labels", "logits_to_keep",
}  # fmt: skip
"""Tensors that a model with other parts is given for text."""
_TYPES = {"token_type_ids", "mm_token_type_ids"}
"""For each token whether it is text (0) or stands for a piece of something else."""
_NO_BACKWARD = "A backward through an earlier call's cache is not possible; pass use_cache=False."


class _EarlierCache(torch.autograd.Function):
    """Lets a user decode without switching gradients off, and refuses a backward: it would lack the cache's share."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise BadUsage(_NO_BACKWARD)


class _Reached(Exception):
    """The blocks were reached by a forward that was to come so far only."""


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
    def capture_around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook on what the trunk is a part of: the mask, of which it may make another for the trunk.

        Raises `BadUsage` for anything but text.
        """
        given = _named(module, args, kwargs)
        _refuse_all_but_text(module, given)
        mask = given.get("attention_mask")
        if mask is None or getattr(mask, "ndim", None) == 2:
            self._caught.around = mask

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def capture(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook on the trunk: the mask and positions as the user gave them.

        Raises `BadUsage` for what remote blocks cannot give.
        """
        kwargs = _named(trunk, args, kwargs)
        if self._ghosts not in trunk._modules.values():
            raise BadUsage(
                "The list of blocks was replaced, and peers run the blocks as the checkpoint has them; leave out "
                "layer_replication, and blocks at the end by del model.model.layers[8:]."
            )
        refuse_outputs(trunk.config, kwargs)
        mask = vars(self._caught).pop("around", kwargs.get("attention_mask"))
        positions = _of_text(kwargs.get("position_ids"), mask)
        if kwargs.get("cu_seq_lens_q") is not None:
            _check_packing(trunk.config, positions)
        self._caught.mask, self._caught.positions = mask, positions

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, blocks: range, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caught = vars(self._caught)
        if "stop" in caught:
            raise _Reached(hidden_states)
        if "output" in caught:
            hidden_states = caught["output"]
        elif not self.probing:
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            hidden_states = self._run(blocks, hidden_states, cache)
        return (hidden_states, None) if self.returns_tuple else hidden_states

    @property
    def whole(self) -> BlockRange:
        """All blocks."""
        return self._ghosts[:]  # type: ignore[no-any-return]

    def path_in(self, model: nn.Module) -> str:
        """The name of the list of blocks in `model`."""
        names = (name for name, module in model.named_modules() if module is self._ghosts)
        return str(next(names))

    @property
    def active_session(self) -> PetalsSession | None:
        """The session of this model that is in use in this thread."""
        return active_session(self)

    def run(self, blocks: range, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after `blocks`, differentiably; in a session of these blocks, on its caches."""
        session = self.active_session
        if session is not None and session.blocks == blocks:
            return session.step(hidden)
        return self._remote(hidden, blocks.start, blocks.stop)

    def step(self, blocks: range, hidden: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states after `blocks`, of tokens that come behind those of `cache`."""
        self._caught.mask = self._caught.positions = None
        return self._run(blocks, hidden, cache)

    def before_blocks(self, forward: Callable[[], Any]) -> torch.Tensor:
        """The hidden states (batch, tokens, hidden size) that `forward`, a run of the model, comes to the blocks with;
        it goes no further. Other threads are not affected.
        """
        self._caught.stop = True
        try:
            forward()
        except _Reached as reached:
            hidden: torch.Tensor = reached.args[0]
            return hidden
        finally:
            del self._caught.stop
        raise RuntimeError("The model did not come to its blocks.")

    def behind_blocks(self, hidden: torch.Tensor, forward: Callable[[], T]) -> T:
        """What `forward`, a run of the model, makes of `hidden` (batch, tokens, hidden size) as what blocks put out.
        Other threads are not affected.
        """
        self._caught.output = hidden
        try:
            return forward()
        finally:
            del self._caught.output

    def inference_session(self, blocks: range) -> AbstractContextManager[PetalsSession]:
        """A session over `blocks`."""
        return new_session(self, blocks)

    def _run(self, blocks: range, hidden: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        session = self.active_session
        if session is not None and session.blocks == blocks and cache is not session.past_key_values:
            raise BadUsage(
                "Within inference_session the model goes on from the session: use generate or session.step, or pass "
                "past_key_values=session.past_key_values."
            )
        check_hidden(hidden)
        layer: RemoteLayer | None = None
        prefix: KvPrefix = {}
        if cache is not None:
            first = cache.layers[0] if cache.layers else None
            layer, prefix = (first, prefix) if isinstance(first, RemoteLayer) else adopt(cache)
        goes_on = layer is not None and layer.session is not None
        is_decoding = goes_on and hidden.shape[1] == 1  # more at once may be a prompt on a cache from before training
        work = self._remote.describe(self._caught.mask, self._caught.positions, fresh=not is_decoding)
        if layer is None:
            return self._remote.apply(work, blocks, hidden, to_host_memory(work, hidden))
        layer.rows = len(hidden)
        if prefix:
            work = replace(work, prefix=prefix)
        is_first = bool(prefix) or not layer.length
        sources = (*layer.sources, *_sources(work, hidden)) if torch.is_grad_enabled() else ()
        if not sources:
            return self._generate(work, blocks, hidden, layer)
        if is_first:
            layer.sources = sources
            return self._train(work, blocks, hidden, layer)
        if self._ghosts.training:
            raise BadUsage(_NO_BACKWARD)
        return _EarlierCache.apply(self._generate(work, blocks, hidden, layer), *sources)  # type: ignore[no-any-return]

    def _train(self, work: Work, blocks: range, hidden: torch.Tensor, layer: RemoteLayer) -> torch.Tensor:
        """A forward with gradients. Transformers made a cache for it, which is filled only if it comes to be used."""
        host = to_host_memory(work, hidden)
        layer.unsent = (*host, layer.length)
        layer.length += hidden.shape[1]
        return self._remote.apply(work, blocks, hidden, host)

    def _generate(self, work: Work, blocks: range, hidden: torch.Tensor, layer: RemoteLayer) -> torch.Tensor:
        if layer.session is None:
            layer.session = self._remote.new_session(blocks)
            if layer.unsent is not None:
                earlier, states, start = layer.unsent
                layer.session.step(earlier, states, [], layer.keep_past, start)
                layer.unsent = None
        elif layer.session.blocks != blocks:
            raise BadUsage(
                f"This cache is of {len(layer.session.blocks)} blocks, and the model has {len(blocks)} now; begin anew."
            )
        edits, layer.edits = layer.edits, []
        output = layer.session.step(*to_host_memory(work, hidden), edits, layer.keep_past, layer.length)
        layer.length += hidden.shape[1]
        return leave(output, hidden.device)


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


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _refuse_all_but_text(module: nn.Module, given: Mapping[str, Any]) -> None:
    own = inspect.signature(type(module).forward).parameters
    for name, value in given.items():
        if name in _TEXT or name not in own:
            continue
        if _has_tensors(value) and (name not in _TYPES or value.any()):
            raise BadUsage(
                f"{name} is for images, sound or the like, and only text goes through a swarm; give the model text "
                "alone."
            )


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def _of_text(positions: Any, mask: Any) -> Any:
    """Positions (batch, tokens), also of a model that counts along time, height and width: they are one for text."""
    if not isinstance(positions, torch.Tensor) or positions.ndim != 3:
        return positions
    if not positions.eq(positions[:1]).all():
        raise BadUsage(
            "position_ids differ along time, height and width, as for images, and only text goes through a swarm; "
            "give the model text alone."
        )
    if mask is None and not positions[0].diff().eq(1).all():
        raise BadUsage(
            "position_ids of three dimensions that begin again within a row do not travel; switch packing off, or give "
            "the model an attention_mask."
        )
    return positions[0]


def _sources(work: Work, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What gradients of this work's output would reach."""
    prefix = (tensor for pair in work.prefix.values() for tensor in pair)
    adapters = work.adapters.tensors.values() if work.adapters else ()
    return tuple(tensor for tensor in (hidden, *prefix, *adapters) if tensor.requires_grad)


def _check_packing(config: Any, positions: torch.Tensor | None) -> None:
    """Where records begin in a packed row is taken from the positions, which say the same as `cu_seq_lens_q`."""
    if positions is None or "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise BadUsage(
            "cu_seq_lens_q does not travel: packed rows need position_ids that begin again with every record, and a "
            "model all of whose layers look at them; switch packing off."
        )
