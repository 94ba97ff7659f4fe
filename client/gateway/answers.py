"""What clients are answered, in the form of OpenAI's interface; field for field what its Python package reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from client.gateway.engine.growing import TokenLogprob
from client.gateway.engine.served import Served


class Usage(BaseModel):
    """Tokens read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(BaseModel):
    """Of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of a completion's texts, or what it grew by."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """Of /v1/completions; each piece of a stream looks the same."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token, and those that might have been in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of an answer's tokens."""

    content: list[ChatLogprob]


class ChatChoice(BaseModel):
    """One of a chat's answers."""

    index: int
    message: dict[str, Any]
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class Chat(BaseModel):
    """Of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


class ChatDelta(BaseModel):
    """What one of a chat's answers grew by. `delta` has no empty fields: clients stumble over them."""

    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """A piece of a stream of /v1/chat/completions."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None


class ModelCard(BaseModel):
    """What is served under a name, as vLLM tells it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "hivetune"
    root: str
    parent: str | None

    @classmethod
    def of(cls, served: Served) -> "ModelCard":
        """Of the model, or of an adapter on it."""
        return cls(id=served.name, created=served.created, root=served.root, parent=served.parent)


class ModelList(BaseModel):
    """Of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


def usage(prompt: int, completion: int) -> Usage:
    """Of a request that has been answered."""
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def text_logprobs(
    served: Served, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], offset: int
) -> TextLogprobs:
    """Of consecutive tokens, the first of which begins at the letter `offset` of the text."""
    pieces = [served.pieces[token] for token in tokens]
    offsets = [offset]
    for piece in pieces[:-1]:
        offsets.append(offsets[-1] + len(piece))
    return TextLogprobs(
        tokens=pieces,
        token_logprobs=[None if each is None else each.logprob for each in logprobs],
        top_logprobs=[None if each is None else _by_piece(served, each) for each in logprobs],
        text_offset=offsets,
    )


def chat_logprobs(served: Served, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Of consecutive tokens."""
    return ChatLogprobs(
        content=[
            ChatLogprob(
                **_top(served, each.token, each.logprob),
                top_logprobs=[TopLogprob(**_top(served, *pair)) for pair in each.top.items()],
            )
            for each in logprobs
        ]
    )


def _by_piece(served: Served, logprob: TokenLogprob) -> dict[str, float]:
    """By what tokens read as. Where several read the same, the likeliest of them counts."""
    found: dict[str, float] = {}
    for token, value in (*logprob.top.items(), (logprob.token, logprob.logprob)):
        found.setdefault(served.pieces[token], value)
    return found


def _top(served: Served, token: int, logprob: float) -> Mapping[str, Any]:
    piece = served.pieces[token]
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}
