"""The names of Petals' interface that Transformers has not: sessions, and prompts that are trained.

docs/compatibility.md has the whole list, and what each name does here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from client.ghosts.blocks import Layer
from client.model.remote_cache import adopt
from protocol.errors import BadUsage

_MODES = ("ptune", "deep_ptune")


class PetalsSession:
    """A generation that goes on over several calls: the tokens so far, and the caches that hold them."""

    def __init__(self, layer: Layer, blocks: range):
        self.layer, self.blocks = layer, blocks
        self.past_key_values = DynamicCache()
        self._cache, _ = adopt(self.past_key_values)
        self._cache.keep_past = True
        self.output_ids: torch.Tensor | None = None
        """(batch, tokens): what `generate` was given and has made, all calls together."""
        self._mask: torch.Tensor | None = None

    @property
    def position(self) -> int:
        """Tokens in the caches. May be set to fewer: the later ones are dropped."""
        return self._cache.length

    @position.setter
    def position(self, tokens: int) -> None:
        if not 0 <= tokens <= self.position:
            raise BadUsage(f"A session of {self.position} tokens cannot go to position {tokens}.")
        self._cache.crop(tokens - self.position)

    def step(self, inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden size) after the blocks, of tokens that the caches hold from then on.

        Without gradients. Raises `NoRoute` and other `protocol.errors`.
        """
        if not inputs.shape[1]:
            return inputs
        with torch.no_grad():
            return self.layer.step(self.blocks, inputs, self.past_key_values)

    def close(self) -> None:
        """End it on the peers."""
        self._cache.reset()

    def generate(self, run: Callable[..., Any], inputs: torch.Tensor | None, options: dict[str, Any]) -> Any:
        """What `run`, a model's own `generate`, makes of all tokens so far and `inputs`; those that are new."""
        before = 0 if self.output_ids is None else self.output_ids.shape[1]
        parts = [ids for ids in (self.output_ids, inputs) if ids is not None]
        if not parts:
            raise BadUsage("A session begins with a prompt: give generate the tokens of one.")
        if before and self._cache.rows not in (0, len(parts[0])):
            raise BadUsage("A session does not go on from beam search, nor from several sequences of one prompt.")
        tokens = torch.cat(parts, 1)
        mask = self._whole_mask(options.pop("attention_mask", None), tokens, before)
        result = run(tokens, **options, **({} if mask is None else {"attention_mask": mask}))
        self.output_ids = result if isinstance(result, torch.Tensor) else result.sequences
        new = self.output_ids[:, before:].clone()
        if isinstance(result, torch.Tensor):
            return new
        result.sequences = new
        return result

    def _whole_mask(self, mask: torch.Tensor | None, tokens: torch.Tensor, before: int) -> torch.Tensor | None:
        """For all tokens, once one was given for any."""
        if mask is not None or self._mask is not None:
            whole = torch.ones_like(tokens)
            if self._mask is not None:
                whole[:, : self._mask.shape[1]] = self._mask
            if mask is not None:
                whole[:, before:] = mask
            self._mask = whole
        return self._mask


_ACTIVE: ContextVar[PetalsSession | None] = ContextVar("active_session", default=None)


def active_session(layer: Layer) -> PetalsSession | None:
    """The session that this thread is in, when it is one of this model's."""
    session = _ACTIVE.get()
    return session if session is not None and session.layer is layer else None


@contextmanager
def use_session(session: PetalsSession | None) -> Iterator[PetalsSession | None]:
    """Within the block `session` is what `generate` and calls of its blocks go on with."""
    token = _ACTIVE.set(session)
    try:
        yield session
    finally:
        _ACTIVE.reset(token)


@contextmanager
def new_session(layer: Layer, blocks: range) -> Iterator[PetalsSession]:
    """Within the block there is a new session, in use."""
    session = PetalsSession(layer, blocks)
    try:
        with use_session(session):
            yield session
    finally:
        session.close()


def add_sessions(model: PreTrainedModel) -> None:
    """Give `model` Petals' `inference_session`, `use_session`, and a `generate` that knows of sessions.

    They are the object's own, and its class stays Transformers'; its copies have theirs.
    """
    for method in (_inference_session, _use_session, _generate):
        object.__setattr__(model, method.__name__.removeprefix("_"), MethodType(method, model))


def _inference_session(model: Any, *, max_length: int | None = None) -> AbstractContextManager[PetalsSession]:
    """A new session, in use within the block. Its caches grow as they are used, whatever `max_length` says."""
    layer: Layer = model.swarm.layer
    return layer.whole.inference_session(max_length=max_length)


def _use_session(_model: Any, session: PetalsSession | None) -> AbstractContextManager[PetalsSession | None]:
    """Within the block `generate` goes on with `session`; None: with none."""
    return use_session(session)


def _generate(
    model: Any, inputs: torch.Tensor | None = None, *args: Any, session: PetalsSession | None = None, **options: Any
) -> Any:
    """As Transformers' `generate`. In a session, the tokens so far come before `inputs`; they are not returned."""
    generate = partial(type(model).generate, model)
    session = session or active_session(model.swarm.layer)
    if session is None:
        return generate(inputs, *args, **options)
    if args:
        raise BadUsage("In a session, give generate its options by name.")
    if session.layer is not model.swarm.layer:
        raise BadUsage("This session is of another model.")
    inputs = options.pop("input_ids", None) if inputs is None else inputs
    if _has_virtual_tokens(model):  # which PEFT puts before every prompt, and counts on a cache without any of it
        with use_session(None):
            return session.generate(generate, inputs, options)
    with use_session(session):
        return session.generate(generate, inputs, options | {"past_key_values": session.past_key_values})


def with_prompts(model: PreTrainedModel, mode: str, length: int) -> PreTrainedModel:
    """PEFT's prompt tuning ("ptune") or prefix tuning ("deep_ptune") on `model`, with `length` virtual tokens.

    Raises `BadUsage` for another mode, or without a length.
    """
    if mode not in _MODES or length < 1:
        raise BadUsage(
            f"tuning_mode is {' or '.join(_MODES)}, and pre_seq_len the number of virtual tokens, 1 or more."
        )
    import peft  # takes seconds

    config = peft.PromptTuningConfig if mode == "ptune" else peft.PrefixTuningConfig
    name = type(model).__name__
    task = "SEQ_CLS" if "SequenceClass" in name else "TOKEN_CLS" if "TokenClass" in name else "CAUSAL_LM"
    return cast(PreTrainedModel, peft.get_peft_model(model, config(num_virtual_tokens=length, task_type=task)))


def _has_virtual_tokens(model: Any) -> bool:
    """Whether a PEFT model of prompts is what has `model` generate."""
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    return owner is not model and owner.active_peft_config.is_prompt_learning
