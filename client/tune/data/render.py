"""Records to text, with the places of the answers in it.

A conversation goes through the tokenizer's chat template where it has one, else through the plain template of Stanford
Alpaca (https://github.com/tatsu-lab/stanford_alpaca). Where an answer begins and ends is found by rendering the
conversation up to it, so any template works, also one without `{% generation %}` marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from client.tune.data.formats import Completion, Conversation, Record, Text, Turn
from client.tune.errors import DataError

_PLAIN_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_PLAIN_HEADS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Input:\n"}


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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self._eos = str(tokenizer.eos_token or "")
        marks = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._marks = tuple(mark for mark in marks if mark)

    def render(self, record: Record, place: str) -> list[Rendered]:
        """The texts to learn from: one, except for a conversation whose template rewrites earlier turns (Qwen3 drops
        their thinking), which gives one text for each answer, as the model will see it when it is to give that answer.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        match record:
            case Conversation():
                turns = self._with_system(record.turns)
                return self._chat(turns, place) if self._tokenizer.chat_template else [self._plain(turns)]
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
        return Rendered(self._apply(turns, "samples.prompts", ask=True), (), add_special=False)

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self._system is None or any(turn.role == "system" for turn in turns):
            return turns
        return (Turn("system", self._system, learned=False), *turns)

    def _closed(self, text: str) -> str:
        return text if self._eos and text.endswith(self._eos) else text + self._eos

    def _plain(self, turns: Sequence[Turn]) -> Rendered:
        has_system = any(turn.role == "system" for turn in turns)
        text, answers = "" if has_system else f"{_PLAIN_SYSTEM}\n\n", []
        for turn in turns:
            text += _PLAIN_HEADS[turn.role]
            start = len(text)
            text += self._closed(turn.content) if turn.role == "assistant" else turn.content
            if turn.learned:
                answers.append((start, len(text)))
            text += "\n\n"
        return Rendered(text.removesuffix("\n\n") if turns[-1].role == "assistant" else text, tuple(answers), True)

    def _chat(self, turns: Sequence[Turn], place: str) -> list[Rendered]:
        full = self._apply(turns, place)
        learned = [index for index, turn in enumerate(turns) if turn.learned]
        upto = {index: self._apply(turns[: index + 1], place) for index in learned}
        spans = {index: self._answer(turns[:index], upto[index], place) for index in learned}
        if all(full.startswith(text[: spans[index][1]]) for index, text in upto.items()):
            return [self._ended(full, [spans[index] for index in learned])]
        return [self._ended(upto[index], [spans[index]]) for index in learned]

    def _answer(self, before: Sequence[Turn], text: str, place: str) -> tuple[int, int]:
        """Where the last turn of `text` begins (after the header that asks for it) and ends (with its closing mark)."""
        start = _common_prefix(self._apply(before, place, ask=True), text)
        stripped = text.rstrip()
        return start, len(stripped) if stripped.endswith(self._marks) else len(text)

    def _ended(self, text: str, answers: list[tuple[int, int]]) -> Rendered:
        """`text`, with the end-of-sequence token put after a last answer that its template leaves open."""
        start, end = answers[-1]
        if not text[end:].strip() and not text[:end].endswith(self._marks):
            text = text[:end] + self._eos
            answers = [*answers[:-1], (start, len(text))]
        return Rendered(text, tuple(answers), add_special=False)

    def _apply(self, turns: Sequence[Turn], place: str, ask: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
        except TemplateError as error:
            raise DataError(f"{place}: the model's chat template refuses this conversation: {error}") from error


def _common_prefix(one: str, other: str) -> int:
    """How many leading characters are the same."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
