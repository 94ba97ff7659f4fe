"""A batched pass in lockstep, for architectures that cannot be packed.

Each session's trunk runs as it would alone, with its own mask, positions and cache, but in a greenlet that stops at
each block until all have come to it. The block runs once, over all tokens laid end to end as one row; what else the
sessions bring to it is passed through. The attention module inside it runs for each session by itself again, in
greenlets that meet at each module in it that works on tokens one by one (a linear layer).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from peer.generation.joined.batched_pass import BatchedPass, BatchMember
from peer.span.span import Adapted, Inputs, Mode, Span
from peer.span.transfer import to_host
from protocol.model.forwards import Forward, replaced


class Lockstep:
    """Runs batched passes on a span in lockstep, a greenlet for each member."""

    def __init__(self, span: Span):
        self._span = span
        self._modules = WeakKeyDictionary[nn.Module, dict[int, list[nn.Module]]]()
        """Module tree -> block -> the modules in it that have weights."""

    def run(self, batch: BatchedPass, mode: Mode, adapted: Adapted | None = None) -> list[torch.Tensor]:
        """See `Joiner.run`."""
        model = adapted.model if adapted else self._span.model
        modules = self._modules_of(model)

        def walk(_: nn.Module, forward: Forward) -> Forward:
            return lambda **arguments: (self._walk(batch, forward, arguments["inputs_embeds"]),)

        with (
            replaced((module for block in mode.blocks for module in modules[block]), _meeting),
            replaced([self._span.where.trunk_of(model)], walk),
        ):
            return batch.split(to_host(self._span.run(Inputs(batch.row()), mode, adapted=adapted)))

    def _modules_of(self, model: nn.Module) -> dict[int, list[nn.Module]]:
        if model not in self._modules:
            blocks = self._span.where.of(model)
            self._modules[model] = {
                index: [m for m in blocks.get_submodule(str(index)).modules() if _may_work_on_tokens(m)]
                for index in self._span.blocks
            }
        return self._modules[model]

    def _walk(self, batch: BatchedPass, forward: Forward, row: torch.Tensor) -> torch.Tensor:
        """The hidden states (1, all tokens, hidden size) after the trunk, of those before it."""
        batch.has_begun = True

        def work(member: BatchMember, hidden: torch.Tensor) -> Any:
            return forward(**self._span.arguments(replace(member.inputs, hidden=hidden), member.cache))[0]

        works = [partial(work, *pair) for pair in zip(batch.members, _split(batch.members, row), strict=True)]
        after: torch.Tensor = _run_each(batch.members, works, at_blocks=True)
        return after


def _may_work_on_tokens(module: nn.Module) -> bool:
    """Convolutions work along the tokens."""
    return next(module.parameters(), None) is not None and not isinstance(module, nn.Conv1d)


class _Walker(greenlet):
    """One member's way through the trunk, or through a module. Switched to, it returns a `_Stop` or its result."""

    def __init__(self, member: BatchMember, start: int, work: Callable[[], Any], at_blocks: bool):
        super().__init__(partial(member.attempt, work))
        self.member, self.start, self._at_blocks = member, start, at_blocks

    def stops_at(self, given: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether a module that it has come to, with these arguments, is run for all members at once."""
        return self._at_blocks or (bool(given) and not options and all(_is_tokens(self.member, own) for own in given))


@dataclass(frozen=True, eq=False)
class _Stop:
    """A module that a walker has come to, and the arguments that it brings."""

    module: nn.Module
    forward: Forward
    given: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Each:
    """Each member's own value, where the values do not make a row."""

    members: Sequence[BatchMember]
    values: Sequence[Any]


_NOTHING = object()
"""The value of a member that has failed or is at another module."""


def place_apart() -> int | None:
    """Where in the row the member begins on whose tokens alone a module runs; `None`: it runs on the whole row."""
    walker = getcurrent()
    return walker.start if isinstance(walker, _Walker) else None


def _meeting(module: nn.Module, forward: Forward) -> Forward:
    """A module's forward during a pass in lockstep."""
    return partial(_meet, module, forward)


def _meet(module: nn.Module, forward: Forward, *given: Any, **options: Any) -> Any:
    walker = getcurrent()
    if isinstance(walker, _Walker):
        if walker.stops_at(given, options):
            return walker.parent.switch(_Stop(module, forward, given, options))  # type: ignore[union-attr]
    elif each := next((value for value in (*given, *options.values()) if isinstance(value, _Each)), None):
        return _run_apart(each.members, forward, given, options)
    return forward(*given, **options)


def _run_apart(
    members: Sequence[BatchMember], forward: Forward, given: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Run a module for each member by itself."""
    split = [_split(members, value) for value in (*given, *options.values())]

    def work(values: Sequence[Any]) -> Any:
        return forward(*values[: len(given)], **dict(zip(options, values[len(given) :], strict=True)))

    return _run_each(members, [partial(work, values) for values in zip(*split, strict=True)], at_blocks=False)


def _run_each(members: Sequence[BatchMember], works: Sequence[Callable[[], Any]], at_blocks: bool) -> Any:
    """Do each member's work, all in step; returns the results, merged."""
    ends = accumulate(member.size for member in members)
    walkers = [
        _Walker(member, end - member.size, work, at_blocks)
        for member, end, work in zip(members, ends, works, strict=True)
    ]
    said = dict[_Walker, Any]()
    try:
        for walker in walkers:
            said[walker] = walker.switch()
        while waiting := [said[walker] for walker in walkers if not walker.dead]:
            module = waiting[0].module
            there = [None if walker.dead or said[walker].module is not module else said[walker] for walker in walkers]
            for walker, stop, answer in zip(walkers, there, _answer(members, there), strict=True):
                if stop:
                    said[walker] = walker.switch(answer)
    finally:
        for walker in walkers:
            if not walker.dead:
                walker.throw()
    errors = [member.error for member in members]
    if errors[0] and all(errors):
        raise errors[0]
    return _merge(members, [_NOTHING if walker.member.error else said[walker] for walker in walkers])


def _answer(members: Sequence[BatchMember], stops: Sequence[_Stop | None]) -> Sequence[Any]:
    """What a module returns to each member: it runs once, for those that have come to it."""
    first = next(stop for stop in stops if stop)
    given = [
        _merge(members, [stop.given[place] if stop else _NOTHING for stop in stops])
        for place in range(len(first.given))
    ]
    options = {
        name: _merge(members, [stop.options[name] if stop else _NOTHING for stop in stops]) for name in first.options
    }
    return _split(members, first.forward(*given, **options))


def _is_tokens(member: BatchMember, value: Any) -> bool:
    """Whether a value is features of each of the member's tokens: (rows, tokens, features)."""
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[:2] == (member.rows, member.tokens)


def _merge(members: Sequence[BatchMember], values: Sequence[Any]) -> Any:
    """Tokens' features as a row (1, all tokens, features), plain values as they are, anything else as `_Each`."""
    pairs = [(member, value) for member, value in zip(members, values, strict=True) if value is not _NOTHING]
    _, like = pairs[0]
    if isinstance(like, tuple):
        columns = ([value if value is _NOTHING else value[i] for value in values] for i in range(len(like)))
        return tuple(_merge(members, column) for column in columns)
    if isinstance(like, bool | int | float | str | None) and all(
        type(value) is type(like) and value == like for _, value in pairs
    ):
        return like
    if not all(_is_tokens(member, value) and value.shape[2] == like.shape[2] for member, value in pairs):
        return _Each(members, values)
    rows = [
        like.new_zeros(1, member.size, like.shape[2]) if value is _NOTHING else value.reshape(1, member.size, -1)
        for member, value in zip(members, values, strict=True)
    ]
    return torch.cat(rows, 1)


def _split(members: Sequence[BatchMember], value: Any) -> Sequence[Any]:
    """The reverse of `_merge`. A module may also have returned (all tokens, features)."""
    if isinstance(value, _Each):
        return value.values
    if isinstance(value, tuple):
        return list(zip(*(_split(members, each) for each in value), strict=True))
    if not isinstance(value, torch.Tensor):
        return [value] * len(members)
    sizes = [member.size for member in members]
    if value.ndim == 2:
        return value.split(sizes)  # type: ignore[no-any-return]
    pairs = zip(members, value.split(sizes, 1), strict=True)
    return [own if member.rows == 1 else own.reshape(member.rows, member.tokens, -1) for member, own in pairs]
