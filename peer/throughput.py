"""How fast a span is, by running it, and how much memory a cached token takes."""

import time
from collections.abc import Callable

import torch

from peer.kv_cache import SpanCache
from peer.span import Inputs, Mode, Span
from protocol.records import Speed

_PROMPT = 32
_FORWARD = 128
_BUDGET = 1.0


@torch.no_grad()
def measure(span: Span) -> tuple[Speed, int]:
    """The span's speed, and the bytes that one cached token of one row takes. Takes about two seconds."""
    mode = Mode(span.blocks)
    cache = SpanCache(span.model.config, span.blocks)

    def step(tokens: int, cache: SpanCache | None) -> None:
        hidden = torch.randn(1, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
        span.run(Inputs(hidden), mode, cache)
        if span.device.type == "cuda":
            torch.cuda.synchronize(span.device)

    step(_PROMPT, cache)
    token_bytes = _bytes_per_token(cache, _PROMPT)
    count = len(span.blocks)
    decode = count / _fastest(lambda: step(1, cache))
    forward = count * _FORWARD / _fastest(lambda: step(_FORWARD, None))
    return Speed(decode=decode, forward=forward), token_bytes


def _fastest(work: Callable[[], None]) -> float:
    """Seconds of the fastest of a few runs: the others were disturbed."""
    best, begin = float("inf"), time.perf_counter()
    for _ in range(8):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > _BUDGET:
            break
    return best


def _bytes_per_token(cache: SpanCache, tokens: int) -> int:
    """Bytes that one token of one row takes in a cache of one row and `tokens` tokens."""
    total = 0
    for layer in cache.own_layers():
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
    return max(1, -(-total // tokens))
