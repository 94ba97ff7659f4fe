"""The keys and values of finished texts, kept on the peers for those that begin alike."""

import asyncio
from dataclasses import dataclass, field

from client.gateway.engine.served import Served
from client.generation.session import InferenceSession


@dataclass(eq=False)
class Kept:
    """A session that waits to be forked, and the tokens that it holds."""

    served: Served
    tokens: list[int]
    session: InferenceSession
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One fork at a time: a session answers one request after the other."""


class Prefixes:
    """Sessions of up to `most` tokens together; those that were used least lately go first."""

    def __init__(self, most: int, croppable: bool):
        self._most, self._croppable = most, croppable
        self._kept: dict[Kept, None] = {}
        self.tokens = 0

    def find(self, served: Served, prompt: list[int]) -> tuple[Kept, int] | None:
        """The session that has most of a prompt, and how many of its first tokens; never all of them."""
        best: tuple[Kept, int] | None = None
        for kept in self._kept:
            if kept.served is not served:
                continue
            count = min(_alike(kept.tokens, prompt), len(prompt) - 1)
            if not self._croppable and count < len(kept.tokens):
                continue
            if count > (best[1] if best else 0):
                best = kept, count
        if best:
            self._kept[best[0]] = self._kept.pop(best[0])  # type: ignore[func-returns-value]
        return best

    def keep(self, served: Served, tokens: list[int], session: InferenceSession) -> None:
        """Keep a session that nobody uses any more; one that it holds all of goes. Closes it where there is no room."""
        if len(tokens) > self._most:
            session.close()
            return
        for kept in list(self._kept):
            if kept.served is served and _alike(kept.tokens, tokens) == len(kept.tokens):
                self._drop(kept)
        self._kept[Kept(served, tokens, session)] = None
        self.tokens += len(tokens)
        while self.tokens > self._most:
            self._drop(next(iter(self._kept)))

    def forget(self, served: Served) -> None:
        """Close the sessions of an adapter that is no longer served."""
        for kept in list(self._kept):
            if kept.served is served:
                self._drop(kept)

    def _drop(self, kept: Kept) -> None:
        del self._kept[kept]
        self.tokens -= len(kept.tokens)
        kept.session.close()


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common from their beginning on; slices are compared without a loop here."""
    known, most = 0, min(len(one), len(other))
    while known < most:
        middle = (known + most + 1) // 2
        if one[known:middle] == other[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known
