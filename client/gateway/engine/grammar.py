"""Texts of a form that a request prescribes: a JSON schema, or a regular expression."""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import LogitsProcessor

from protocol.errors import BadUsage, first_line

_JSON: Any = {"whitespace_pattern": r"[ \n\t]{0,64}"}
"""Between two pieces of JSON; without an end a model may put nothing else for ever."""


class Grammars:
    """Makes what keeps a text to a grammar, for one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, list(ends)
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None

    def of_schema(self, schema: dict[str, Any] | bool) -> Callable[[], "KeepsTo"]:
        """Of JSON that fits a schema. Raises `BadUsage`."""
        return self._maker("The JSON schema", lambda: LLMatcher.grammar_from_json_schema(json.dumps(schema), _JSON))

    def of_regex(self, regex: str) -> Callable[[], "KeepsTo"]:
        """Of texts that a regular expression matches wholly. Raises `BadUsage`."""
        return self._maker("The regular expression", lambda: LLMatcher.grammar_from_regex(regex))

    def _maker(self, what: str, make: Callable[[], str]) -> Callable[[], "KeepsTo"]:
        tokenizer = self._read_tokenizer()
        try:
            grammar = make()
            problem = LLMatcher.validate_grammar(grammar, tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise BadUsage(f"{what} cannot be kept to ({first_line(ValueError(problem)).rstrip('.')}).")
        return lambda: KeepsTo(LLMatcher(tokenizer, grammar, log_level=0))

    def _read_tokenizer(self) -> LLTokenizer:
        """Takes about a second, once."""
        with self._lock:
            if self._known is None:
                size = max(self._vocabulary, len(self._tokenizer))
                try:
                    self._known = llguidance.hf.from_tokenizer(self._tokenizer, size, self._ends or None)
                except ValueError as error:
                    raise BadUsage(
                        f"With this model's tokenizer no form can be prescribed ({first_line(error)})."
                    ) from error
            return self._known


class KeepsTo(LogitsProcessor):
    """Leaves only the tokens with which a text may go on. Of one text."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._seen: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens = input_ids[0].tolist()
        if self._seen is not None and not self._matcher.is_stopped():
            self._matcher.consume_tokens(tokens[self._seen :])
        self._seen = len(tokens)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise BadUsage(
                f"The form of the answer cannot be kept to ({first_line(ValueError(self._matcher.get_error()))})."
            )
        allowed = torch.from_numpy(bits[: scores.shape[1]].astype(bool))
        return scores.masked_fill(~allowed, float("-inf"))  # type: ignore[return-value]
