"""Steps of generations: each gets its memory by itself, then all go through the trunk together where that can be."""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.compute.batch_counts import BatchCounts
from peer.generation.joined.batched_pass import BatchedPass, BatchMember, Joiner
from peer.generation.joined.lora_rows import LoraApplier, Segment
from peer.kv_cache.session import Session
from peer.span.failures import is_of_the_device
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
    without an adapter do, each one even alone.
    """

    def __init__(self, span: Span, adapters: AdapterStore, joiner: Joiner | None, compiled: Joiner | None = None):
        self._span, self._adapters, self._joiner, self._compiled = span, adapters, joiner, compiled
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
        ready = []
        with ExitStack() as running:
            for step in sorted(steps, key=lambda step: id(step.adapter) if step.adapter else 0):
                try:
                    running.enter_context(step.session.running())
                    step.prepare(self._span)
                    ready.append(step)
                except Exception as error:
                    outcomes[step] = error
            if len(ready) > 1 or (ready and self._is_compiled(ready[0])):
                outcomes |= self._run_together(ready)
            elif ready:
                outcomes[ready[0]] = self._run_alone(ready[0])
        return [outcomes[step] for step in steps]

    def _run_alone(self, step: Step) -> Outcome:
        """As plain Transformers would."""
        self.counts.count(1)
        try:
            result = self._span.run(step.inputs, step.mode, step.session.cache, self._adapted(step.adapter))
            result = to_host(result)
        except Exception as error:
            step.session.close()  # some layers of its cache have taken the tokens, others not
            return error
        step.count_tokens()
        return result

    def _run_together(self, steps: Sequence[Step]) -> dict[Step, Outcome]:
        batch = BatchedPass([BatchMember(step.inputs, step.session.cache) for step in steps])
        try:
            results = self._call_trunk(steps, batch)
        except Exception as error:
            if batch.has_begun:
                return {step: _lose(step, error, alone=len(steps) == 1) for step in steps}
            return {step: self._run_alone(step) for step in steps}
        self.counts.count(len(steps))
        outcomes = map(_outcome, steps, batch.members, results)
        return dict(zip(steps, outcomes, strict=True))

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


def _outcome(step: Step, member: BatchMember, hidden: torch.Tensor) -> Outcome:
    if member.error:
        step.session.close()
        return member.error
    step.count_tokens()
    return hidden


def _lose(step: Step, error: Exception, alone: bool) -> Outcome:
    """Some layers of its cache have taken the tokens, others not."""
    step.session.close()
    if alone or isinstance(error, SwarmError) or is_of_the_device(error):
        return error
    kind = type(error).__name__
    return SessionLost(f"A call for several sessions failed ({kind}); send this session's tokens again.")
