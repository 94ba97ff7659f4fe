"""Conversations as prompts: by the model's own template."""

import inspect
import json
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from client.gateway.engine.served import Served
from client.gateway.engine.text import Stops
from client.gateway.refusals import Refused
from client.gateway.requests import ChatRequest, Message
from client.tokenizer import fault_of_text, fault_of_tokens
from protocol.errors import first_line

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_NOT_FOR_TEMPLATES = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "add_generation_prompt", "continue_final_message",
}  # fmt: skip
"""What the tokenizer does with a conversation is not for strangers to say."""


def chat_prompt(served: Served, request: ChatRequest) -> list[int]:
    """The tokens of a conversation, up to where the answer begins. Raises `Refused`."""
    tools = request.tools if request.tool_choice != "none" else None
    options = request.chat_template_kwargs or {}
    if own := sorted(options.keys() & _NOT_FOR_TEMPLATES):
        raise Refused(400, f"chat_template_kwargs: {own[0]!r} is not for the template.", param="chat_template_kwargs")
    return render(served, request.messages, tools=tools, **options)


def render(served: Served, messages: Sequence[Message], **options: Any) -> list[int]:
    """The tokens of a conversation by the model's template, which knows `options`. Raises `Refused`."""
    tokenizer = served.tokenizer
    if not tokenizer.chat_template:
        raise Refused(400, f"{served.name} has no chat template; use /v1/completions.", param="messages")
    conversation = [_plain(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **{"add_generation_prompt": True} | options)
    except Exception as error:  # a template may refuse by any error, its own sentence in it
        raise Refused(
            400, f"The model's chat template refuses this ({first_line(error)}).", param="messages"
        ) from error
    return encode(served, text, add_special_tokens=False)


def encode(served: Served, text: str, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text. Raises `Refused` for one that is no text."""
    if fault := fault_of_text(text):
        raise Refused(400, f"The prompt {fault}.", param="prompt")
    tokenizer = served.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    bos = tokenizer.bos_token
    if add_special_tokens and bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]  # the text's own, and the tokenizer's
    return ids


def check_tokens(served: Served, tokens: Sequence[int]) -> None:
    """Raises `Refused` for tokens that the model does not have."""
    if fault := fault_of_tokens(served.tokenizer, tokens, served.vocabulary):
        raise Refused(400, f"The prompt {fault}.", param="prompt")


class ToolCalls:
    """Takes the calls of tools out of an answer's text, in the form that most templates teach."""

    def __init__(self) -> None:
        self._shown = Stops([_CALL])
        self._rest = ""

    def add(self, text: str) -> str:
        """What of the text can be shown."""
        if self._shown.found:
            self._rest += text
            return ""
        shown = self._shown.add(text)
        self._rest = self._shown.rest
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What more can be shown, and the calls, as OpenAI tells them; text that is no call is shown as it is."""
        if not self._shown.found:
            return self._shown.end(), []
        calls = list[dict[str, Any]]()
        for part in self._rest.split(_CALL):
            try:
                call = json.loads(part.partition(_CALL_END)[0])
                name, arguments = call["name"], call["arguments"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return _CALL + self._rest, []
            function = {"name": str(name), "arguments": json.dumps(arguments, ensure_ascii=False)}
            number = {"index": len(calls), "id": f"call_{uuid.uuid4().hex[:24]}"}
            calls.append(number | {"type": "function", "function": function})
        return "", calls


def _plain(message: Message) -> dict[str, Any]:
    """As templates expect it: a text in place of parts, arguments of tools as objects."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        kinds = {part.get("type") for part in message.content}
        if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in message.content):
            raise Refused(
                400, "messages: only text can be sent through a swarm; leave out images and sound.", param="messages"
            )
        plain["content"] = "".join(part["text"] for part in message.content)
    for call in plain.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise Refused(400, "messages: the arguments of a tool call are not JSON.", param="messages") from error
    return plain
