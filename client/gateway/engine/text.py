"""Tokens to text as they come, and the strings at which a text stops."""

from collections.abc import Sequence
from typing import Any

_LOOK_BACK = 6
"""Tokens before a new one that are decoded with it: what a token reads as may depend on them."""
_INCOMPLETE = "\ufffd"
"""What a decoder puts for a character of which some bytes are yet to come."""


class TextStream:
    """The text of tokens that come one by one, behind a prompt. Special tokens are left out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_LOOK_BACK:])
        self._start, self._done = 0, len(self._ids)

    def add(self, token: int) -> str:
        """What the text grows by; nothing while a character is incomplete."""
        self._ids.append(token)
        text = self._rest()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._take(text)

    def end(self) -> str:
        """What is left, an incomplete character included."""
        return self._take(self._rest())

    def _rest(self) -> str:
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _take(self, text: str) -> str:
        self._start, self._done = max(0, self._done - _LOOK_BACK), len(self._ids)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Stops:
    """Lets text through up to the first of some strings, which is left out."""

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.found = False
        self.rest = ""
        """What came with the string that was found, behind it."""

    def add(self, text: str) -> str:
        """What can be given away, now that `text` has come: not what may be the beginning of one of the strings."""
        held = self._held + text
        hits = [(at, string) for string in self._strings if (at := held.find(string)) >= 0]
        if hits:
            at, string = min(hits)
            self.found, self._held, self.rest = True, "", held[at + len(string) :]
            return held[:at]
        keep = max((_overlap(held, string) for string in self._strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that `string` begins with."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)


class Pieces:
    """What single tokens read as within a text, special ones included."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._before = tokenizer.decode(self._anchor)
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            text = self._tokenizer.decode([*self._anchor, token])
            is_after = text.startswith(self._before)
            self._known[token] = text[len(self._before) :] if is_after else self._tokenizer.decode([token])
        return self._known[token]
