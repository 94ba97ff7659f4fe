"""All texts in the making go on together: one run of the model's own parts has a row of each whose step has come back.

A thread of its own runs them. What is on the peers is done meanwhile on the client's loop, every session by itself;
peers join the steps that reach them together.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from client.gateway.engine.growing import Echoed, Event, Growing, TokenLogprob, Wanted, token_logprobs
from client.gateway.engine.halves import Halves
from client.gateway.engine.prefixes import Kept, Prefixes
from client.gateway.engine.served import Served, Shelf
from client.generation.dynamic_rope import DynamicRope
from client.model.handle import swarm_of
from protocol import swarm_pb2 as pb
from protocol.errors import BadUsage, PeerFailed, SwarmError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_QUIET, _WAIT = 0.05, 0.2
"""When some steps have come back, others are waited for: for these shares of the time that the last of them took, since
the last one came, and in all. Peers that have computed steps together answer them one after the other.
"""
_LEAST, _MOST = 0.001, 0.05
"""Seconds of that at least, and at most."""
_ECHO_ROWS = 64
"""Tokens of a prompt whose log-probabilities are computed between two rounds, which wait for that."""


class Engine:
    """Makes the texts that are wanted. May be asked from any thread; events come from the engine's."""

    def __init__(self, shelf: Shelf, prefix_tokens: int, most_running: int):
        self.shelf = shelf
        model = shelf.model
        self._halves, self._swarm = Halves(model), swarm_of(model)
        text = model.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        is_whole = bool(DynamicRope.of(text))  # keys depend on the pass that made them: a prompt goes in one
        self.prefixes = Prefixes(0 if is_whole else prefix_tokens, croppable=not kinds & {"linear_attention", "conv"})
        self._keeps_past = prefix_tokens > 0
        self._blocks = range(len(self._swarm.blocks))
        self._most_running = most_running
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[list[Growing]] = deque()
        self._steps: dict[Growing, Future[torch.Tensor]] = {}
        """What peers are at."""
        self._decoding: dict[Growing, float] = {}
        """Those of it that are steps of one token, and when they began."""
        self._took = 0.0
        """Seconds of the last one."""
        self._followers: dict[Growing, list[Growing]] = {}
        """Texts with the prompt of one that is being read; they go on from a copy of its session."""
        self._ready: list[tuple[Growing, torch.Tensor]] = []
        """With the hidden states (1, 1, hidden size) of the last token."""
        self._echoing: dict[Growing, _Echo] = {}
        self._alive: set[Growing] = set()
        self.prefix_hits = 0
        """Tokens of prompts that did not have to be read again."""
        self.own_seconds = 0.0
        """That this machine computed, in `rounds` rounds."""
        self.rounds = 0
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether texts are made at all."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Texts in the making."""
        return len(self._alive)

    @property
    def waiting(self) -> int:
        """Texts that wait for others to end."""
        return sum(map(len, list(self._waiting)))

    def start(self, wanted: Sequence[tuple[Wanted, Callable[[Event], Any]]]) -> "list[Growing]":
        """Begin texts that share a prompt, which is read once; each has its events called for.

        Raises `BadUsage` where what is wanted makes no sense to Transformers.
        """
        try:
            texts = [Growing(each, self.shelf.model, emit) for each, emit in wanted]
        except (ValueError, TypeError) as error:
            raise BadUsage(f"The options do not go together: {error}.") from error
        self._inbox.put(lambda: self._waiting.append(texts))
        return texts

    def cancel(self, texts: Sequence[Growing]) -> None:
        """Nobody wants these any more."""
        self._inbox.put(lambda: self._cancel(texts))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run something on the engine's thread, between two rounds."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def load(self, name: str, folder: Path) -> "Future[Served]":
        """Serve an adapter; see `Shelf.load`."""
        return self.call(lambda: self.shelf.load(name, folder))

    def unload(self, name: str) -> "Future[None]":
        """Serve an adapter no longer; texts that are being made with it end well. See `Shelf.unload`."""

        def unload() -> None:
            served = self.shelf.get(name)
            self.shelf.unload(name)
            if served is not None:
                self.prefixes.forget(served)

        return self.call(unload)

    def stop(self) -> None:
        """End the thread; texts that are in the making are left as they are."""

        def stop() -> None:
            self._is_stopped = True

        self._inbox.put(stop)
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            while not self._is_stopped:
                try:
                    self._gather()
                    start = time.perf_counter()
                    self._admit()
                    self._round()
                    self.own_seconds += time.perf_counter() - start
                except Exception:  # of a fault here one text may suffer, and never all that come after
                    _log.exception("The engine failed in a round.")

    def _gather(self) -> None:
        """What has happened; waits a moment for steps that are about to come back, so that they share a round."""
        if self._echoing:
            self._take_all()
            return
        self._inbox.get()()
        until = time.monotonic() + _clamped(_WAIT * self._took)
        while self._ready and self._decoding and (left := until - time.monotonic()) > 0:
            try:
                self._inbox.get(timeout=min(_clamped(_QUIET * self._took), left))()
            except queue.Empty:
                return
        self._take_all()

    def _take_all(self) -> None:
        while not self._inbox.empty():
            self._inbox.get()()

    def _admit(self) -> None:
        while self._waiting and (not self._alive or len(self._alive) + len(self._waiting[0]) <= self._most_running):
            leader, *followers = texts = self._waiting.popleft()
            self._alive.update(texts)
            self._followers[leader] = followers
            self._guard(texts, lambda leader=leader: self._read_prompt(leader))  # type: ignore[misc]

    def _read_prompt(self, text: Growing) -> None:
        """Begin with the prompt, behind what a kept session has of it."""
        prompt = text.wanted.prompt
        found = None if text.wanted.echo_logprobs else self.prefixes.find(text.wanted.served, list(prompt))
        kept, start = found if found else (None, 0)
        self.prefix_hits += start
        hidden = self._before(text.wanted.served, [prompt[start:]], [start])
        self._ask(text, self._prefill(text, kept, start, hidden), lambda output: self._came_back(text, output))

    async def _prefill(self, text: Growing, kept: Kept | None, start: int, hidden: torch.Tensor) -> torch.Tensor:
        edits = []
        if kept is None:
            session = self._swarm.blocks.new_session(self._blocks)
        else:
            async with kept.lock:
                session = await kept.session.run_fork()
            if start < len(kept.tokens):
                edits = [pb.CacheEdit(crop=len(kept.tokens) - start)]
        text.session = session
        output = await session.run_step(text.wanted.served.work, hidden, edits, self._keeps_past, start)
        text.cached = start + hidden.shape[1]
        for follower in self._followers.get(text, ()):
            follower.session, follower.cached = await session.run_fork(), text.cached
        return output

    def _ask(self, text: Growing, coroutine: Any, then: Callable[[torch.Tensor], None]) -> None:
        """Have the client's loop do something for a text, and go on with what comes of it."""
        future = self._swarm.network.loop.start(coroutine)
        self._steps[text] = future

        def done(future: "Future[torch.Tensor]") -> None:
            self._inbox.put(lambda: self._done(text, future, then))

        future.add_done_callback(done)

    def _done(self, text: Growing, future: "Future[torch.Tensor]", then: Callable[[torch.Tensor], None]) -> None:
        if self._steps.get(text) is not future:
            if text.session is not None:
                text.session.close()  # it was given up meanwhile
            return
        del self._steps[text]
        if (began := self._decoding.pop(text, None)) is not None:
            self._took = time.monotonic() - began
        self._guard([text, *self._followers.get(text, ())], lambda: then(future.result()))

    def _came_back(self, text: Growing, output: torch.Tensor) -> None:
        followers = self._followers.pop(text, [])
        if text.wanted.echo_logprobs and not text.tokens[len(text.wanted.prompt) :]:
            self._echoing[text] = _Echo(output, followers)
            return
        last = output[:, -1:]
        self._ready += [(each, last) for each in (text, *followers) if not each.is_over]

    def _round(self) -> None:
        """Everything that is ready gets its next token, and goes on."""
        ready, self._ready = self._ready, []
        self.rounds += bool(ready)
        for served, group in self._by_parts(ready, lambda pair: pair[0]):
            self._guard([text for text, _ in group], lambda served=served, group=group: self._advance(served, group))  # type: ignore[misc]
        for text, echo in list(self._echoing.items())[:1]:
            self._guard([text, *echo.followers], lambda text=text, echo=echo: self._echo(text, echo))  # type: ignore[misc]

    def _advance(self, served: Served | None, group: "list[tuple[Growing, torch.Tensor]]") -> None:
        with self.shelf.on(served):
            logits = self._halves.behind(torch.cat([last for _, last in group]))[:, -1]
        for (text, _), row in zip(group, logits, strict=True):
            if not text.is_over:
                self._guard([text], lambda text=text, row=row: text.take(row))  # type: ignore[misc]
                if text.is_over:
                    self._end(text)
        going = [text for text, _ in group if not text.is_over]
        if not going:
            return
        hidden = self._before(served, [text.tokens[-1:] for text in going], [text.cached for text in going])
        now = time.monotonic()
        for text, row in zip(going, hidden.split(1), strict=True):
            self._decoding[text] = now
            self._ask(text, self._step(text, row), lambda output, text=text: self._came_back(text, output))  # type: ignore[misc]

    async def _step(self, text: Growing, hidden: torch.Tensor) -> torch.Tensor:
        assert text.session is not None
        work = text.wanted.served.work
        output = await text.session.run_step(work, hidden, [], self._keeps_past, text.cached)
        text.cached += 1
        return output

    def _echo(self, text: Growing, echo: "_Echo") -> None:
        """Some more of the log-probabilities of a prompt's tokens; then it goes on."""
        prompt = text.wanted.prompt
        end = min(echo.done + _ECHO_ROWS, len(prompt) - 1)
        if end > echo.done:
            with self.shelf.on(self._parts(text)):
                logits = self._halves.behind(echo.hidden[:, echo.done : end])[0]
            tokens = prompt[echo.done + 1 : end + 1]
            echo.logprobs += token_logprobs(logits, tokens, text.wanted.logprobs or 0)
            echo.done = end
        if echo.done == len(prompt) - 1:
            del self._echoing[text]
            for each in (text, *echo.followers):
                each.emit(Echoed(echo.logprobs))
                self._ready.append((each, echo.hidden[:, -1:]))
            self._inbox.put(lambda: None)

    def _before(self, served: Served | None, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(tokens)
        positions = torch.tensor(starts)[:, None] + torch.arange(ids.shape[1])
        with self.shelf.on(served if served and served.is_outside else None):
            return self._halves.before(ids, positions)

    def _parts(self, text: Growing) -> Served | None:
        """Whose own embeddings and head a text needs; None: the model's, which most share."""
        served = text.wanted.served
        return served if served.is_outside else None

    def _by_parts(self, items: Iterable[T], text_of: Callable[[T], Growing]) -> "list[tuple[Served | None, list[T]]]":
        groups: dict[Served | None, list[T]] = {}
        for item in items:
            groups.setdefault(self._parts(text_of(item)), []).append(item)
        return list(groups.items())

    def _guard(self, texts: Sequence[Growing], run: Callable[[], None]) -> None:
        """What goes wrong ends the texts that it is about, and nothing else."""
        try:
            run()
        except (SwarmError, CancelledError) as error:
            self._give_up(texts, error if isinstance(error, SwarmError) else PeerFailed("The request was cancelled."))
        except Exception:
            _log.exception("A text could not go on.")
            self._give_up(texts, PeerFailed("The gateway failed at this request; its log says why."))

    def _give_up(self, texts: Sequence[Growing], error: SwarmError) -> None:
        for text in texts:
            if not text.is_over:
                text.fail(error)
            self._end(text, keeps=False)

    def _cancel(self, texts: Sequence[Growing]) -> None:
        for group in list(self._waiting):
            if group[0] in texts:
                self._waiting.remove(group)
                for text in group:
                    text.is_over = True
        for text in texts:
            if not text.is_over:
                text.is_over = True
                self._end(text, keeps=False)
        self._ready = [(text, hidden) for text, hidden in self._ready if not text.is_over]

    def _end(self, text: Growing, keeps: bool = True) -> None:
        """A text is over: its session is kept for others, or closed."""
        if text not in self._alive:
            return
        self._alive.remove(text)
        self._followers.pop(text, None)
        self._echoing.pop(text, None)
        self._decoding.pop(text, None)
        if (step := self._steps.pop(text, None)) is not None:
            step.cancel()
        session, text.session = text.session, None
        if session is None:
            return
        served = text.wanted.served
        if keeps and self.shelf.get(served.name) is served:
            self.prefixes.keep(served, text.tokens[: text.cached], session)
        else:
            session.close()


def _clamped(seconds: float) -> float:
    return min(max(seconds, _LEAST), _MOST)


class _Echo:
    """The log-probabilities of a prompt's tokens in the making."""

    def __init__(self, hidden: torch.Tensor, followers: list[Growing]):
        self.hidden, self.followers = hidden, followers
        self.done = 0
        self.logprobs: list[TokenLogprob | None] = [None]
