"""One text in the making."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from client.gateway.engine.sampling import Chooser, Sampling
from client.gateway.engine.served import Served
from client.gateway.engine.text import Stops, TextStream
from client.generation.session import InferenceSession
from protocol.errors import SwarmError


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and those of the likeliest ones at its place, the likeliest first."""

    token: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Grown:
    """A token has come, and text; there may be none of either."""

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Echoed:
    """The log-probabilities of a prompt's tokens; the first one has none."""

    logprobs: Sequence[TokenLogprob | None]


@dataclass(frozen=True)
class Finished:
    """It is complete: `reason` is "stop" or "length"."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """It ends here."""

    error: SwarmError


Event = Grown | Echoed | Finished | Failed


@dataclass(frozen=True)
class Wanted:
    """What is asked for: a text behind a prompt."""

    served: Served
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    """How many of the likeliest tokens to give log-probabilities of, beside the chosen one; None: none at all."""
    echo_logprobs: bool = False
    """Whether to give those of the prompt's tokens as well."""
    make_processors: Callable[[], Sequence[LogitsProcessor]] = tuple
    """Further processors of logits; those with a state are of one sequence each."""


class Growing:
    """A text in the making. Used by the engine's thread."""

    def __init__(self, wanted: Wanted, model: PreTrainedModel, emit: Callable[[Event], Any]):
        self.wanted, self.emit = wanted, emit
        self.session: InferenceSession | None = None
        self.cached = 0
        """Tokens whose keys and values the session holds."""
        self.tokens = list(wanted.prompt)
        self.is_over = False
        self._chooser = Chooser(model, wanted.sampling, len(wanted.prompt), wanted.make_processors())
        self._text = TextStream(wanted.served.tokenizer, wanted.prompt)
        self._stops = Stops(wanted.stop)
        self._left = wanted.max_tokens

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token by logits (vocabulary,) in float32 on the CPU, and give it away."""
        if not self._left:
            return self._finish("length")
        logits = logits[None]
        token = self._chooser.choose(self.tokens, logits)
        self._left -= 1
        self.tokens.append(token)
        logprob = None
        if self.wanted.logprobs is not None:
            (logprob,) = token_logprobs(logits, [token], self.wanted.logprobs)
        is_end = token in self._chooser.ends
        text = self._stops.add(self._text.add(token))
        if (is_end or not self._left) and not self._stops.found:
            text += self._stops.add(self._text.end())
            if not self._stops.found:
                text += self._stops.end()
        self.emit(Grown(text, token, logprob))
        if self._stops.found or is_end:
            self._finish("stop")
        elif not self._left:
            self._finish("length")

    def fail(self, error: SwarmError) -> None:
        """It cannot go on."""
        self.is_over = True
        self.emit(Failed(error))

    def _finish(self, reason: str) -> None:
        self.is_over = True
        self.emit(Finished(reason))


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of each of `tokens`, by logits (tokens, vocabulary) in float32 on the CPU: its own, and the `top` likeliest."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    return [
        TokenLogprob(token, value, dict(zip(ids, values, strict=True)))
        for token, value, ids, values in zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
