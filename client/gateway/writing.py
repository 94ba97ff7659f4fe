"""The texts that a request asks for, as they come from the engine to its HTTP answer."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from client.gateway.engine.engine import Engine
from client.gateway.engine.growing import Echoed, Event, Failed, Finished, Grown, TokenLogprob, Wanted
from client.gateway.metrics import Metrics


class Text:
    """One text, as far as it has come."""

    def __init__(self, index: int, wanted: Wanted):
        self.index, self.wanted = index, wanted
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.echoed: Sequence[TokenLogprob | None] = ()
        self.reason: str | None = None


async def write(
    engine: Engine, metrics: Metrics, prompts: Sequence[Sequence[Wanted]]
) -> AsyncGenerator[tuple[Text, Event], None]:
    """Events, each with its text after it, until all texts are complete; what each of `prompts` has shares a prompt.

    Raises the `SwarmError` that ends one of them. However this ends, the engine works on none of them any more.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[Text, Event]] = asyncio.Queue()

    def to(text: Text) -> Callable[[Event], object]:
        return lambda event: loop.call_soon_threadsafe(events.put_nowait, (text, event))

    texts = [Text(index, wanted) for index, wanted in enumerate(wanted for group in prompts for wanted in group)]
    waiting, begun, left = iter(texts), [], len(texts)
    start = time.monotonic()
    try:
        for group in prompts:
            begun += engine.start([(wanted, to(next(waiting))) for wanted in group])
            metrics.prompt_tokens.inc(len(group[0].prompt))
        while left:
            text, event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Grown):
                text.text += event.text
                if event.token is not None:
                    if not text.tokens:
                        metrics.first_token.observe(time.monotonic() - start)
                    text.tokens.append(event.token)
                    metrics.generated_tokens.inc()
                if event.logprob is not None:
                    text.logprobs.append(event.logprob)
            elif isinstance(event, Echoed):
                text.echoed = event.logprobs
            elif isinstance(event, Finished):
                text.reason = event.reason
                left -= 1
            yield text, event
    finally:
        if left:
            engine.cancel(begun)
