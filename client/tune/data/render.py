"""Records to text, with the places of the answers in it.

A conversation goes through the tokenizer's chat template where it has one, else through the plain template of Stanford
Alpaca (https://github.com/tatsu-lab/stanford_alpaca). Where an answer begins and ends is found by rendering the
conversation up to it, so any template works, also one without `{% generation %}` marks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from client.tune.data.formats import Completion, Content, Conversation, Record, Text, Turn
from client.tune.data.notes import Notes
from client.tune.errors import DataError
from protocol.errors import first_line

_PLAIN_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_PLAIN_HEADS = {
    "system": "",
    "developer": "",
    "user": "### Instruction:\n",
    "assistant": "### Response:\n",
    "tool": "### Input:\n",
}
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template raises: its own refusals, and what its expressions do with values it does not expect."""
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
"""One thing under three names: Transformers gives it to the template under all of them."""
_PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text to tokenize. `answers` are (start, end) in characters, in order, each with the mark that ends its turn;
    `add_special` says that the tokenizer still has to put its own special tokens around (a chat template writes them).
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    add_special: bool


class Renderer:
    """Renders the records of one run.

    Args:
        tokenizer: its chat template and special tokens are used.
        system: the system message of conversations that bring none.
        notes: where to count what the template does not show.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None, notes: Notes) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self._notes = notes
        self._eos = str(tokenizer.eos_token or "")
        marks = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._marks = tuple(mark for mark in marks if mark)
        self._shows_text = self._shows(_PROBE)
        self._shows_parts = self._shows([{"type": "text", "text": _PROBE}])

    def render(self, record: Record, place: str) -> list[Rendered]:
        """The texts to learn from: one, except for a conversation whose template rewrites earlier turns (Qwen3 drops
        their thinking), which gives one text for each answer, as the model will see it when it is to give that answer.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        match record:
            case Conversation():
                turns, template = self._with_system(record.turns), self._template(record.tools)
                self._note_hidden(turns, record.tools, template)
                return self._chat(turns, record.tools, place) if template else [self._plain(turns)]
            case Completion():
                text = self._closed(record.prompt + record.completion)
                return [Rendered(text, ((len(record.prompt), len(text)),), add_special=True)]
            case Text():
                text = self._closed(record.text)
                return [Rendered(text, ((0, len(text)),), add_special=True)]

    def question(self, text: str, as_chat: bool) -> Rendered:
        """What the model is given to answer `text`: a user's turn, or (not `as_chat`) the text itself."""
        if not as_chat:
            return Rendered(text, (), add_special=True)
        turns = self._with_system((Turn("user", text, learned=False),))
        if not self._tokenizer.chat_template:
            return Rendered(self._plain(turns).text + _PLAIN_HEADS["assistant"], (), add_special=True)
        return Rendered(self._apply(turns, None, "samples.prompts", ask=True), (), add_special=False)

    def _template(self, tools: list[dict[str, Any]] | None) -> str:
        """The chat template, "" where there is none. A model may have several by name, one of them for tools."""
        return str(self._tokenizer.get_chat_template(tools=tools)) if self._tokenizer.chat_template else ""

    def _shows(self, content: Content) -> bool:
        """Whether the chat template shows a message's content in this form: as text, and not as Python writes it."""
        try:
            text = self._write([{"role": "user", "content": content}], None, ask=False)
        except _REFUSALS:
            return isinstance(content, str)
        return _PROBE in text and "'type'" not in text

    def _note_hidden(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None, template: str) -> None:
        words = _words(template)
        given = {key for turn in turns for key in turn.more} | ({"tools"} if tools else set())
        for key in sorted(given - words):
            self._notes.count("not shown by the template", repr(key))
        if "developer" not in words and any(turn.role == "developer" for turn in turns):
            self._notes.count("roles", "'developer' read as system")

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self._system is None or any(turn.role in ("system", "developer") for turn in turns):
            return turns
        return (Turn("system", self._system, learned=False), *turns)

    def _closed(self, text: str) -> str:
        return text if self._eos and text.endswith(self._eos) else text + self._eos

    def _plain(self, turns: Sequence[Turn]) -> Rendered:
        has_system = any(turn.role in ("system", "developer") for turn in turns)
        text, answers = "" if has_system else f"{_PLAIN_SYSTEM}\n\n", []
        for turn in turns:
            text += _PLAIN_HEADS[turn.role]
            start = len(text)
            text += self._closed(turn.text) if turn.role == "assistant" else turn.text
            if turn.learned:
                answers.append((start, len(text)))
            text += "\n\n"
        return Rendered(text.removesuffix("\n\n") if turns[-1].role == "assistant" else text, tuple(answers), True)

    def _chat(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None, place: str) -> list[Rendered]:
        full = self._apply(turns, tools, place)
        learned = [index for index, turn in enumerate(turns) if turn.learned]
        upto = {index: self._apply(turns[: index + 1], tools, place) for index in learned}
        spans = {index: self._answer(turns[: index + 1], tools, upto[index], place) for index in learned}
        if all(full.startswith(text[: spans[index][1]]) for index, text in upto.items()):
            return [self._ended(full, [spans[index] for index in learned])]
        return [self._ended(upto[index], [spans[index]]) for index in learned]

    def _answer(
        self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None, text: str, place: str
    ) -> tuple[int, int]:
        """Where the last turn of `text` begins (after the header that asks for it) and ends (with its closing mark)."""
        *before, last = turns
        stripped = text.rstrip()
        end = len(stripped) if stripped.endswith(self._marks) else len(text)
        header = ""
        if before and last.role == "assistant":
            asked, told = (self._apply(before, tools, place, ask=ask) for ask in (True, False))
            if text.startswith(told):
                return _common_prefix(asked, text), end
            # This answer changes what is told before (gpt-oss drops its thinking).
            header = asked.removeprefix(told)
        other = replace(last, content="1" if last.text.strip().startswith("0") else "0", more={})
        words = _common_prefix(self._apply([*before, other], tools, place), text)
        asks = text.rfind(header, 0, words) if header else -1
        return words if asks < 0 else asks + len(header), end

    def _ended(self, text: str, answers: list[tuple[int, int]]) -> Rendered:
        """`text`, with the end-of-sequence token put after a last answer that its template leaves open."""
        start, end = answers[-1]
        if not text[end:].strip() and not text[:end].endswith(self._marks):
            text = text[:end] + self._eos
            answers = [*answers[:-1], (start, len(text))]
        return Rendered(text, tuple(answers), add_special=False)

    def _apply(self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None, place: str, ask: bool = False) -> str:
        try:
            return self._write([self._message(turn, tools) for turn in turns], tools, ask)
        except _REFUSALS as error:
            reason = first_line(error)
            raise DataError(f"{place}: the model's chat template refuses this conversation: {reason}") from error

    def _write(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, ask: bool) -> str:
        apply: Any = self._tokenizer.apply_chat_template
        return str(apply(messages, tools=tools, tokenize=False, add_generation_prompt=ask))

    def _message(self, turn: Turn, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
        """The message as the template is to see it: whole, in a form that the template shows."""
        role, content = str(turn.role), turn.content
        if role == "developer" and role not in _words(self._template(tools)):
            role = "system"  # whose place it has taken at OpenAI
        if isinstance(content, list) and not self._shows_parts:
            content = turn.text
        elif isinstance(content, str) and not self._shows_text and self._shows_parts:
            content = [{"type": "text", "text": content}]
        return {**turn.more, "role": role, "content": content}


@cache
def _words(template: str) -> frozenset[str]:
    """The words of a template: the keys that it reads are among them."""
    words = frozenset(re.findall(r"\w+", template))
    return words | _REASONING if words & _REASONING else words


def _common_prefix(one: str, other: str) -> int:
    """How many leading characters are the same."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
