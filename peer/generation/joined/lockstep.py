"""Several sessions in one trunk call, whatever the architecture.

Each session's trunk runs as it would alone, with its own mask, positions and cache, but in a greenlet, and stops at
each block until all are there. The block runs once, over all tokens laid end to end as one row; what the sessions bring
to it beside tokens is passed through. So it comes to the attention module, which again is run for each session by
itself, and they wait for each other where it comes to a module that works on tokens one by one (a linear layer).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from peer.generation.joined.call import JointCall, Part
from peer.span.span import (
    Adapted,
    Inputs,
    Mode,
    Span,
)
from peer.span.transfer import to_host

Forward = Callable[..., Any]


@contextmanager
def replaced_forwards(modules: Iterable[nn.Module], make: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Within the block each module's forward is `make(module, forward)`."""
    before = []
    for module in modules:
        before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = make(module, module.forward)
    try:
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


class Lockstep:
    """Runs joint calls on a span, a greenlet for each part."""

    def __init__(self, span: Span):
        self._span = span
        self._modules = WeakKeyDictionary[nn.Module, dict[int, list[nn.Module]]]()
        """Module tree -> block -> the modules in it that have weights."""

    def run(self, call: JointCall, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """See `Joiner.run`."""
        model = adapted.model if adapted else self._span.model
        modules = self._modules_of(model)

        def walk(_: nn.Module, forward: Forward) -> Forward:
            return lambda **arguments: (self._walk(call, forward, arguments["inputs_embeds"]),)

        with (
            replaced_forwards((module for block in mode.blocks for module in modules[block]), partial(partial, _meet)),
            replaced_forwards([self._span.where.trunk_of(model)], walk),
        ):
            return call.split(to_host(self._span.run(Inputs(call.row()), mode, adapted=adapted)))

    def _modules_of(self, model: nn.Module) -> dict[int, list[nn.Module]]:
        if model not in self._modules:
            blocks = self._span.where.of(model)
            self._modules[model] = {
                index: [m for m in blocks.get_submodule(str(index)).modules() if _may_work_on_tokens(m)]
                for index in self._span.blocks
            }
        return self._modules[model]

    def _walk(self, call: JointCall, forward: Forward, row: torch.Tensor) -> torch.Tensor:
        """The hidden states (1, all tokens, hidden size) after the trunk, of those before it."""
        call.has_begun = True

        def work(part: Part, hidden: torch.Tensor) -> Any:
            return forward(**self._span.arguments(replace(part.inputs, hidden=hidden), part.cache))[0]

        works = [partial(work, *pair) for pair in zip(call.parts, _split(call.parts, row), strict=True)]
        after: torch.Tensor = _run_each(call.parts, works, at_blocks=True)
        return after


def _may_work_on_tokens(module: nn.Module) -> bool:
    """Convolutions work along the tokens."""
    return next(module.parameters(), None) is not None and not isinstance(module, nn.Conv1d)


class _Walker(greenlet):
    """One part's way through the trunk, or through a module. Switched to, it returns a `_Request` or its result."""

    def __init__(self, part: Part, start: int, work: Callable[[], Any], at_blocks: bool):
        super().__init__(partial(part.attempt, work))
        self.part, self.start, self._at_blocks = part, start, at_blocks

    def stops(self, given: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether a module that it has come to is to be run for all."""
        return self._at_blocks or (bool(given) and not options and all(_is_tokens(self.part, own) for own in given))


@dataclass(frozen=True, eq=False)
class _Request:
    """A module that a walker has come to, and what it brings."""

    module: nn.Module
    forward: Forward
    given: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Each:
    """What each part brings, where that does not make a row."""

    parts: Sequence[Part]
    values: Sequence[Any]


_NOTHING = object()
"""In the place of what a part would bring that has failed or is elsewhere."""


def place_apart() -> int | None:
    """Where in the row the part begins for which alone a module is being run; `None`: it is run over the whole row."""
    walker = getcurrent()
    return walker.start if isinstance(walker, _Walker) else None


def _meet(module: nn.Module, forward: Forward, *given: Any, **options: Any) -> Any:
    """A module's forward during a joint call."""
    walker = getcurrent()
    if isinstance(walker, _Walker):
        if walker.stops(given, options):
            return walker.parent.switch(_Request(module, forward, given, options))  # type: ignore[union-attr]
    elif each := next((value for value in (*given, *options.values()) if isinstance(value, _Each)), None):
        return _run_apart(each.parts, forward, given, options)
    return forward(*given, **options)


def _run_apart(parts: Sequence[Part], forward: Forward, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A module for each part by itself."""
    split = [_split(parts, value) for value in (*given, *options.values())]

    def work(values: Sequence[Any]) -> Any:
        return forward(*values[: len(given)], **dict(zip(options, values[len(given) :], strict=True)))

    return _run_each(parts, [partial(work, values) for values in zip(*split, strict=True)], at_blocks=False)


def _run_each(parts: Sequence[Part], works: Sequence[Callable[[], Any]], at_blocks: bool) -> Any:
    """Have each part do its work, all in step; returns what comes of it, merged."""
    ends = accumulate(part.size for part in parts)
    walkers = [
        _Walker(part, end - part.size, work, at_blocks) for part, end, work in zip(parts, ends, works, strict=True)
    ]
    said = dict[_Walker, Any]()
    try:
        for walker in walkers:
            said[walker] = walker.switch()
        while waiting := [said[walker] for walker in walkers if not walker.dead]:
            module = waiting[0].module
            there = [None if walker.dead or said[walker].module is not module else said[walker] for walker in walkers]
            for walker, request, answer in zip(walkers, there, _answer(parts, there), strict=True):
                if request:
                    said[walker] = walker.switch(answer)
    finally:
        for walker in walkers:
            if not walker.dead:
                walker.throw()
    errors = [part.error for part in parts]
    if errors[0] and all(errors):
        raise errors[0]
    return _merge(parts, [_NOTHING if walker.part.error else said[walker] for walker in walkers])


def _answer(parts: Sequence[Part], requests: Sequence[_Request | None]) -> Sequence[Any]:
    """What a module that some parts have come to returns to each part."""
    first = next(request for request in requests if request)
    given = [
        _merge(parts, [request.given[place] if request else _NOTHING for request in requests])
        for place in range(len(first.given))
    ]
    options = {
        name: _merge(parts, [request.options[name] if request else _NOTHING for request in requests])
        for name in first.options
    }
    return _split(parts, first.forward(*given, **options))


def _is_tokens(part: Part, value: Any) -> bool:
    """Whether it is features of each of the part's tokens: (rows, tokens, features)."""
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[:2] == (part.rows, part.tokens)


def _merge(parts: Sequence[Part], values: Sequence[Any]) -> Any:
    """Tokens' features as a row (1, all tokens, features), plain values as they are, anything else as `_Each`."""
    pairs = [(part, value) for part, value in zip(parts, values, strict=True) if value is not _NOTHING]
    _, like = pairs[0]
    if isinstance(like, tuple):
        columns = ([value if value is _NOTHING else value[i] for value in values] for i in range(len(like)))
        return tuple(_merge(parts, column) for column in columns)
    if isinstance(like, bool | int | float | str | None) and all(
        type(value) is type(like) and value == like for _, value in pairs
    ):
        return like
    if not all(_is_tokens(part, value) and value.shape[2] == like.shape[2] for part, value in pairs):
        return _Each(parts, values)
    rows = [
        like.new_zeros(1, part.size, like.shape[2]) if value is _NOTHING else value.reshape(1, part.size, -1)
        for part, value in zip(parts, values, strict=True)
    ]
    return torch.cat(rows, 1)


def _split(parts: Sequence[Part], value: Any) -> Sequence[Any]:
    """The reverse of `_merge`. A module may also have returned (all tokens, features)."""
    if isinstance(value, _Each):
        return value.values
    if isinstance(value, tuple):
        return list(zip(*(_split(parts, each) for each in value), strict=True))
    if not isinstance(value, torch.Tensor):
        return [value] * len(parts)
    sizes = [part.size for part in parts]
    if value.ndim == 2:
        return value.split(sizes)  # type: ignore[no-any-return]
    pairs = zip(parts, value.split(sizes, 1), strict=True)
    return [own if part.rows == 1 else own.reshape(part.rows, part.tokens, -1) for part, own in pairs]
