"""Steps of generations: each gets its memory by itself, then all go through the trunk together where that can be."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.compute.batch_counts import BatchCounts
from peer.compute.failures import let_go
from peer.generation.joined.batched_pass import BatchedPass, BatchMember, Joiner
from peer.generation.joined.lora_rows import LoraApplier, Segment
from peer.kv_cache.session import Session
from peer.span.failures import is_of_the_machine, is_out_of_memory
from peer.span.span import Adapted, Inputs, Mode, Span
from peer.span.transfer import prefix_on, to_host
from protocol.cache_edits import Edit
from protocol.errors import SessionLost, SwarmError
from protocol.tensors import KvPrefix

Outcome = torch.Tensor | Exception
"""Of a step: hidden states (rows, tokens, hidden size) on the CPU, or why there are none."""


@dataclass(eq=False)
class Step:
    """New tokens for a session's cache, and edits to it before them: read, and checked as far as the message tells."""

    session: Session
    inputs: Inputs
    """As they came: `prepare` takes them to the span's device."""
    mode: Mode
    adapter: StoredAdapter | None = None
    edits: Sequence[Edit] = ()
    prefix: KvPrefix = field(default_factory=dict)
    """Of a session's first step only."""
    keep_past: bool = False
    """Whether layers with sliding windows must stay croppable."""

    @property
    def size(self) -> int:
        """Tokens, of all rows."""
        return self.inputs.hidden.shape[:2].numel()

    def prepare(self, span: Span) -> None:
        """At the step's turn: get memory, and edit the cache. See `Session.prepare` for what it raises."""
        rows, tokens = self.inputs.hidden.shape[:2]
        self.inputs = self.inputs.on(span.device, span.dtype)
        prefix = prefix_on(self.prefix, span.device, span.dtype) if self.prefix else {}
        self.session.prepare(self.edits, rows, tokens, prefix, self.keep_past)

    def count_tokens(self) -> None:
        """The cache has taken the new tokens."""
        self.session.cache.seen += self.inputs.hidden.shape[1]


class StepRunner:
    """Runs steps on a span. What runs them belongs on the compute thread.

    `joiner`: how steps of several sessions go through the trunk in one pass; `None`: not at all. `compiled`: how those
    without an adapter do, each one even alone. `make_room`: frees what memory others can spare; a step that did not fit
    is then tried once more, alone.
    """

    def __init__(
        self,
        span: Span,
        adapters: AdapterStore,
        joiner: Joiner | None,
        compiled: Joiner | None = None,
        make_room: Callable[[], object] = lambda: None,
    ):
        self._span, self._adapters, self._joiner, self._compiled = span, adapters, joiner, compiled
        self._make_room = make_room
        self._lora = LoraApplier(span)
        self.counts = BatchCounts()

    def group(self, step: Step) -> Hashable | None:
        """Steps of one group may be run together; `None`: on its own."""
        mode, adapter = step.mode, step.adapter
        if not self._joiner or mode.training or mode.dropout_seed is not None or mode.autocast is not None:
            return None
        return mode.blocks, id(adapter) if adapter and not adapter.lora else None

    @torch.no_grad()
    def run(self, steps: list[Step]) -> list[Outcome]:
        """What becomes of each of `steps`, which are of one group and of different sessions."""
        outcomes: dict[Step, Outcome] = {}
        with ExitStack() as running:
            ready = sorted(steps, key=lambda step: id(step.adapter) if step.adapter else 0)
            for step in ready:
                try:
                    running.enter_context(step.session.running())
                    step.prepare(self._span)
                except Exception as error:
                    outcomes[step] = error
            self._run(outcomes, [step for step in ready if step not in outcomes])
        return [outcomes[step] for step in steps]

    def _run(self, outcomes: dict[Step, Outcome], steps: Sequence[Step]) -> None:
        """Note what becomes of `steps`; those that did not fit are tried once more, alone, when others gave way."""
        marks = [step.session.cache.mark() for step in steps]
        if len(steps) > 1 or any(map(self._is_compiled, steps)):
            outcomes |= self._run_together(steps)
        else:
            outcomes |= {step: self._run_alone(step) for step in steps}
        for step, go_back in zip(steps, marks, strict=True):
            outcome = outcomes[step]
            if go_back and isinstance(outcome, Exception) and is_out_of_memory(outcome):
                let_go(outcome)
                self._make_room()
                go_back()
                outcomes[step] = self._run_alone(step)
        for step in steps:
            if isinstance(outcomes[step], Exception):
                step.session.close()  # some layers of its cache have taken the tokens, others not
            else:
                step.count_tokens()

    def _run_alone(self, step: Step) -> Outcome:
        """As plain Transformers would."""
        self.counts.count(1)
        try:
            result = self._span.run(step.inputs, step.mode, step.session.cache, self._adapted(step.adapter))
            return to_host(result)
        except Exception as error:
            return error

    def _run_together(self, steps: Sequence[Step]) -> dict[Step, Outcome]:
        batch = BatchedPass([BatchMember(step.inputs, step.session.cache) for step in steps])
        try:
            results = self._call_trunk(steps, batch)
        except Exception as error:
            if batch.has_begun:
                return dict.fromkeys(steps, _told(error, alone=len(steps) == 1))
        else:
            self.counts.count(len(steps))
            pairs = zip(steps, batch.members, results, strict=True)
            return {step: member.error or hidden for step, member, hidden in pairs}
        return {step: self._run_alone(step) for step in steps}

    def _call_trunk(self, steps: Sequence[Step], batch: BatchedPass) -> list[torch.Tensor]:
        assert self._joiner is not None, "group() is None without one"
        mode, adapter = steps[0].mode, steps[0].adapter
        if all(step.adapter is adapter for step in steps):
            if adapter is None and self._compiled:
                return self._compiled.run(batch, mode)
            return self._joiner.run(batch, mode, self._adapted(adapter))
        with self._lora.applied(_segments(steps, batch)):
            return self._joiner.run(batch, mode)

    def _is_compiled(self, step: Step) -> bool:
        return self._compiled is not None and step.adapter is None and self.group(step) is not None

    def _adapted(self, adapter: StoredAdapter | None) -> Adapted | None:
        return self._adapters.adapt(adapter, adapter.tensors) if adapter else None


def _segments(steps: Sequence[Step], batch: BatchedPass) -> list[Segment]:
    """The tokens that run with each LoRA; steps with the same one lie side by side."""
    segments: list[Segment] = []
    end = 0
    for step, member in zip(steps, batch.members, strict=True):
        start, end = end, end + member.size
        lora = step.adapter.lora if step.adapter else None
        if lora and segments and segments[-1].lora is lora:
            start = segments.pop().start
        if lora:
            segments.append(Segment(start, end, lora))
    return segments


def _told(error: Exception, alone: bool) -> Exception:
    """What each session is told when a pass for several has failed."""
    if alone or isinstance(error, SwarmError) or is_of_the_machine(error):
        return error
    kind = type(error).__name__
    return SessionLost(f"A call for several sessions failed ({kind}); send this session's tokens again.")
