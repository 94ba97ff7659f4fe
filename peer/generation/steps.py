"""Steps of generations: checked one by one, run together where that can be."""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from peer.adapters.store import AdapterStore, Bundle
from peer.compute.tally import Tally
from peer.generation.joined.batched_pass import BatchedPass, BatchMember, Joiner
from peer.generation.joined.lora_rows import LoraApplier, Segment
from peer.kv_cache.edits import apply_edit, check_edits
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import Prefix, fill
from peer.span.checks import check_inputs, check_prefix, prefix_length
from peer.span.span import (
    Adapted,
    Inputs,
    Mode,
    Span,
)
from peer.span.transfer import to_host
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import BadRequest, SessionLost, SwarmError

Outcome = torch.Tensor | Exception
"""Of a step: hidden states (rows, tokens, hidden size) on the CPU, or why there are none."""


@dataclass(eq=False)
class Step:
    """New tokens for a session's cache, and edits to it before them."""

    session: Session
    message: Message
    body: pb.Step
    mode: Mode
    bundle: Bundle | None
    inputs: Inputs = field(init=False)
    """Known when it has been checked."""
    _prefix: Prefix = field(init=False)
    _length: int = field(init=False)
    """Tokens per row that its cache will hold."""

    @property
    def size(self) -> int:
        """Tokens, of all rows."""
        hidden = self.message.tensors.get("hidden_states")
        return max(1, hidden.shape[:2].numel()) if hidden is not None else 1

    def check(self, span: Span) -> None:
        """See that the step can be run, and reserve its memory. Raises `BadRequest`, `TooLong`, `PeerFull`."""
        session, message = self.session, self.message
        seen, rows = check_edits(session, self.body.edits)
        past = seen if session.number else prefix_length(message.tensors)
        self.inputs = check_inputs(span, message, past, session.memory.max_length)
        batch, tokens = self.inputs.hidden.shape[:2]
        if session.number and batch != rows:
            raise BadRequest(f"The step has {batch} rows, its session {rows}.")
        self._prefix = {} if session.number else check_prefix(span, self.mode, message, batch)
        self._length = past + tokens
        session.reserve(batch, self._length)

    def edit(self) -> None:
        """Make the cache what it is before the new tokens."""
        session = self.session
        with session.changing():
            for edit in self.body.edits:
                apply_edit(session.cache, edit)
            session.batch_size = self.inputs.hidden.shape[0]
            session.trim(session.batch_size, self._length)
            if self._prefix:
                fill(session.cache, self._prefix)
            if self.body.keep_past:
                session.cache.activate_past_recording()

    def count_tokens(self) -> None:
        """The cache has taken the new tokens."""
        self.session.cache.seen += self.inputs.hidden.shape[1]


class StepRunner:
    """Runs steps on a span. What runs them belongs on the compute thread.

    `joiner`: how steps of several sessions go through the trunk in one call; `None`: not at all. `compiled`: how those
    without an adapter do, each one even alone.
    """

    def __init__(self, span: Span, adapters: AdapterStore, joiner: Joiner | None, compiled: Joiner | None = None):
        self._span, self._adapters, self._joiner, self._compiled = span, adapters, joiner, compiled
        self._lora = LoraApplier(span)
        self.tally = Tally()

    def group(self, step: Step) -> Hashable | None:
        """Steps of one group may be run together; `None`: on its own."""
        mode, bundle = step.mode, step.bundle
        if not self._joiner or mode.training or mode.dropout_seed is not None or mode.autocast is not None:
            return None
        return mode.blocks, id(bundle) if bundle and not bundle.lora else None

    @torch.no_grad()
    def run(self, steps: list[Step]) -> list[Outcome]:
        """What becomes of each of `steps`, which are of one group and of different sessions."""
        outcomes: dict[Step, Outcome] = {}
        ready = []
        with ExitStack() as running:
            for step in sorted(steps, key=lambda step: id(step.bundle) if step.bundle else 0):
                try:
                    running.enter_context(step.session.running())
                    step.check(self._span)
                    step.edit()
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
        self.tally.count(1)
        try:
            with step.session.changing():
                result = self._span.run(step.inputs, step.mode, step.session.cache, self._adapted(step.bundle))
                result = to_host(result)
                step.count_tokens()
        except Exception as error:
            return error
        return result

    def _run_together(self, steps: Sequence[Step]) -> dict[Step, Outcome]:
        batch = BatchedPass([BatchMember(step.inputs, step.session.cache) for step in steps])
        try:
            results = self._call_trunk(steps, batch)
        except Exception as error:
            if batch.has_begun:
                return {step: _lose(step, error, alone=len(steps) == 1) for step in steps}
            return {step: self._run_alone(step) for step in steps}
        self.tally.count(len(steps))
        outcomes = map(_outcome, steps, batch.members, results)
        return dict(zip(steps, outcomes, strict=True))

    def _call_trunk(self, steps: Sequence[Step], batch: BatchedPass) -> list[torch.Tensor]:
        assert self._joiner is not None, "group() is None without one"
        mode, bundle = steps[0].mode, steps[0].bundle
        if all(step.bundle is bundle for step in steps):
            if bundle is None and self._compiled:
                return self._compiled.run(batch, mode)
            return self._joiner.run(batch, mode, self._adapted(bundle))
        with self._lora.applied(_segments(steps, batch)):
            return self._joiner.run(batch, mode)

    def _is_compiled(self, step: Step) -> bool:
        return self._compiled is not None and step.bundle is None and self.group(step) is not None

    def _adapted(self, bundle: Bundle | None) -> Adapted | None:
        return self._adapters.adapt(bundle, bundle.tensors) if bundle else None


def _segments(steps: Sequence[Step], batch: BatchedPass) -> list[Segment]:
    """The tokens that run with each LoRA; steps with the same one lie side by side."""
    segments: list[Segment] = []
    end = 0
    for step, member in zip(steps, batch.members, strict=True):
        start, end = end, end + member.size
        lora = step.bundle.lora if step.bundle else None
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
    if alone or isinstance(error, SwarmError):
        return error
    kind = type(error).__name__
    return SessionLost(f"A call for several sessions failed ({kind}); send this session's tokens again.")
