"""A span's speed, measured by running it, and the memory that a cached token takes."""

import torch

from peer.kv_cache.span_cache import SpanCache
from peer.span.span import Inputs, Mode, Span
from peer.span.transfer import to_host
from protocol.machine.timing import fastest
from protocol.model.anatomy import context_length
from protocol.records import Speed

_PROMPT = 32
_FORWARD = 128
_DECODES = 8
"""The most steps that are timed; each lengthens the cache."""
_SAMPLE = 4
"""Blocks of the span that the forward is measured on: all of a large model's would take many seconds."""


@torch.no_grad()
def measure(span: Span) -> tuple[Speed, int]:
    """The span's speed, and the bytes of one cached token of one row. Takes about a second if a step is quick."""
    cache = SpanCache(span.config, span.blocks)
    context = context_length(span.config) or _FORWARD  # some blocks have tables of so many positions
    prompt, tokens = max(1, min(_PROMPT, context - _DECODES)), min(_FORWARD, context)

    def step(tokens: int, blocks: range, cache: SpanCache | None) -> None:
        hidden = torch.randn(1, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
        to_host(span.run(Inputs(hidden), Mode(blocks), cache))  # waits for the device, whatever it is

    step(prompt, span.blocks, cache)
    token_bytes = _bytes_per_token(cache, prompt)
    sample = span.blocks[-_SAMPLE:]  # the last ones: a model's first blocks may be of another type than most
    decode = len(span.blocks) / fastest(lambda: step(1, span.blocks, cache), _DECODES)
    forward = len(sample) * tokens / fastest(lambda: step(tokens, sample, None))
    return Speed(decode=decode, forward=forward), token_bytes


def _bytes_per_token(cache: SpanCache, tokens: int) -> int:
    """Bytes that one token of one row takes in a cache of one row and `tokens` tokens."""
    total = 0
    for layer in cache.own_layers():
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
    return max(1, -(-total // tokens))
