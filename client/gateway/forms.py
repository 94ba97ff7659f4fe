"""Texts in the form of an answer, at once or piece by piece."""

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from client.gateway import answers
from client.gateway.chat import ToolCalls
from client.gateway.engine.growing import Event, Finished, Grown, TokenLogprob
from client.gateway.engine.served import Served
from client.gateway.refusals import refused
from client.gateway.requests import ChatRequest, CompletionRequest
from client.gateway.streams import as_json
from client.gateway.writing import Text
from protocol.errors import SwarmError


class Form(Protocol):
    """Of the answers of one endpoint."""

    with_usage: bool
    """Whether the last piece of a stream tells the usage."""

    def whole(self, texts: Sequence[Text], usage: answers.Usage) -> BaseModel:
        """The answer at once."""

    def piece(self, text: Text, event: Event) -> BaseModel | None:
        """What a stream says of an event; None: nothing."""

    def begin(self, text: Text) -> BaseModel:
        """What a stream says of a text first."""

    def end(self, usage: answers.Usage) -> BaseModel:
        """The piece that tells the usage."""


class _Form:
    def __init__(self, prefix: str, served: Served, asked: CompletionRequest | ChatRequest):
        self.served, self.asked = served, asked
        self.with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model,
        }  # fmt: skip


class CompletionForm(_Form):
    """Of /v1/completions."""

    def __init__(self, served: Served, asked: CompletionRequest):
        super().__init__("cmpl", served, asked)
        self._echo = asked.echo
        self._logprobs = asked.logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, texts: Sequence[Text], usage: answers.Usage) -> BaseModel:
        """The answer at once."""
        choices = []
        for text in texts:
            prompt = self._prompt(text)
            tokens: list[int] = text.tokens
            logprobs: list[TokenLogprob | None] = [*text.logprobs]
            if self._echo:
                tokens, logprobs = [*text.wanted.prompt, *tokens], [*text.echoed, *logprobs]
            told = None
            if self._logprobs is not None:
                told = answers.text_logprobs(self.served, tokens, logprobs, 0)
            choices.append(
                answers.TextChoice(index=text.index, text=prompt + text.text, logprobs=told, finish_reason=text.reason)
            )
        return answers.Completion(**self._head, choices=choices, usage=usage)

    def begin(self, text: Text) -> BaseModel:
        """The prompt, if it is to be echoed."""
        logprobs = None
        if self._echo and self._logprobs is not None:
            logprobs = answers.text_logprobs(self.served, text.wanted.prompt, text.echoed, 0)
        return self._one(text, self._prompt(text), logprobs)

    def piece(self, text: Text, event: Event) -> BaseModel | None:
        """What a text grew by, or why it ends."""
        if isinstance(event, Finished):
            return self._one(text, "", None, event.reason)
        if not isinstance(event, Grown) or not (event.text or event.logprob):
            return None
        logprobs = None
        if event.logprob is not None:
            offset = self._offsets.get(text.index, 0)
            logprobs = answers.text_logprobs(self.served, [event.logprob.token], [event.logprob], offset)
        self._offsets[text.index] = self._offsets.get(text.index, 0) + len(event.text)
        return self._one(text, event.text, logprobs)

    def end(self, usage: answers.Usage) -> BaseModel:
        """The piece that tells the usage."""
        return answers.Completion(**self._head, choices=[], usage=usage)

    def _one(
        self, text: Text, grown: str, logprobs: answers.TextLogprobs | None, reason: str | None = None
    ) -> BaseModel:
        choice = answers.TextChoice(index=text.index, text=grown, logprobs=logprobs, finish_reason=reason)
        return answers.Completion(**self._head, choices=[choice], usage=None)

    def _prompt(self, text: Text) -> str:
        if not self._echo:
            return ""
        return str(self.served.tokenizer.decode(text.wanted.prompt, skip_special_tokens=True))


class ChatForm(_Form):
    """Of /v1/chat/completions."""

    def __init__(self, served: Served, asked: ChatRequest):
        super().__init__("chatcmpl", served, asked)
        self._has_tools = bool(asked.tools) and asked.tool_choice != "none"
        self._calls = defaultdict[int, ToolCalls](ToolCalls)

    def whole(self, texts: Sequence[Text], usage: answers.Usage) -> BaseModel:
        """The answer at once."""
        choices = []
        for text in texts:
            message: dict[str, Any] = {"role": "assistant", "content": text.text}
            reason = text.reason
            if self._has_tools:
                shown = self._calls[text.index].add(text.text)
                rest, calls = self._calls[text.index].end()
                if calls:
                    message |= {"content": shown + rest or None, "tool_calls": [_without_index(call) for call in calls]}
                    reason = "tool_calls"
            logprobs = answers.chat_logprobs(self.served, text.logprobs) if self.asked.logprobs else None
            choices.append(
                answers.ChatChoice(index=text.index, message=message, logprobs=logprobs, finish_reason=reason)
            )
        return answers.Chat(**self._head, choices=choices, usage=usage)

    def begin(self, text: Text) -> BaseModel:
        """Who speaks."""
        return self._one(text, {"role": "assistant", "content": ""})

    def piece(self, text: Text, event: Event) -> BaseModel | None:
        """What an answer grew by, or why it ends."""
        if isinstance(event, Finished):
            rest, calls = self._calls[text.index].end() if self._has_tools else ("", [])
            delta = ({"content": rest} if rest else {}) | ({"tool_calls": calls} if calls else {})
            return self._one(text, delta, None, "tool_calls" if calls else event.reason)
        if not isinstance(event, Grown):
            return None
        shown = self._calls[text.index].add(event.text) if self._has_tools else event.text
        if not (shown or event.logprob):
            return None
        logprobs = answers.chat_logprobs(self.served, [event.logprob]) if event.logprob else None
        return self._one(text, {"content": shown}, logprobs)

    def end(self, usage: answers.Usage) -> BaseModel:
        """The piece that tells the usage."""
        return answers.ChatChunk(**self._head, choices=[], usage=usage)

    def _one(
        self, text: Text, delta: dict[str, Any], logprobs: answers.ChatLogprobs | None = None, reason: str | None = None
    ) -> BaseModel:
        choice = answers.ChatDelta(index=text.index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return answers.ChatChunk(**self._head, choices=[choice], usage=None)


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key != "index"}


async def whole(form: Form, events: AsyncIterator[tuple[Text, Event]]) -> BaseModel:
    """The answer when all texts are complete. Raises `SwarmError`."""
    texts: dict[int, Text] = {}
    async for text, _ in events:
        texts[text.index] = text
    ordered = [texts[index] for index in sorted(texts)]
    return form.whole(ordered, _usage(ordered))


async def pieces(
    form: Form, first: tuple[Text, Event], events: AsyncIterator[tuple[Text, Event]]
) -> AsyncGenerator[str, None]:
    """A stream's pieces: JSON, and what ends it."""
    texts: dict[int, Text] = {}
    try:
        async for text, event in _then(first, events):
            if text.index not in texts and isinstance(event, Grown | Finished):
                texts[text.index] = text
                yield form.begin(text).model_dump_json()
            if (said := form.piece(text, event)) is not None:
                yield said.model_dump_json()
        if form.with_usage:
            yield form.end(_usage(list(texts.values()))).model_dump_json()
    except SwarmError as error:
        yield as_json(refused(error).body())
    yield "[DONE]"


async def _then(
    first: tuple[Text, Event], rest: AsyncIterator[tuple[Text, Event]]
) -> AsyncIterator[tuple[Text, Event]]:
    yield first
    async for each in rest:
        yield each


def _usage(texts: Sequence[Text]) -> answers.Usage:
    """A prompt counts once, however many texts go on from it."""
    prompts = {id(text.wanted.prompt): len(text.wanted.prompt) for text in texts}
    return answers.usage(sum(prompts.values()), sum(len(text.tokens) for text in texts))
