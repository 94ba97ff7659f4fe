"""Blocks of BLOOM-176B's shape and others, as a peer runs them, and the steps per second of the whole that follow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.capacity import LINKS, link_seconds
from benchmarks.gpu.gpu import Gpu
from benchmarks.gpu.models import RandomCheckpoint, shaped
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.trials import try_arena_and_joining, try_compiling
from benchmarks.joined_calls import Bench
from peer.adapters.store import AdapterStore
from peer.generation.steps import Step, StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from peer.span.loading import block_bytes, load_span
from peer.span.span import Inputs, Mode
from peer.start.speed import measure
from peer.training.call import TrainingCall
from peer.training.trainer import Trainer

_GB, _MB = 1e9, 1e6
_PEERS = 3
"""As in the measurements of the Petals paper (arXiv 2209.01188)."""
_SESSIONS = 8
_UNBOUNDED = 2**62


@dataclass(frozen=True)
class Case:
    """Some blocks of a model."""

    model: str
    quantize: str
    count: int


_CASES = (
    Case("BLOOM-176B", "nf4", 4),
    Case("BLOOM-176B", "int8", 2),
    Case("BLOOM-176B", "none", 1),
    Case("Llama-3.3-70B", "nf4", 4),
    Case("Llama-2-7B", "nf4", 4),
    Case("Llama-2-7B", "none", 4),
)
_TINY = (Case("BLOOM-176B", "nf4", 2), Case("Llama-2-7B", "none", 2))


def run(report: Report, gpu: Gpu, tiny: bool) -> None:
    """Every case: loading, trials, decode, training."""
    for case in _TINY if tiny else _CASES:
        name = f"{case.count} of {case.model}, {case.quantize}"
        report.attempt("blocks", name, lambda case=case, name=name: _run_case(report, gpu, case, name, tiny), needs=30)  # type: ignore[misc]


def _run_case(report: Report, gpu: Gpu, case: Case, name: str, tiny: bool) -> Figures:
    bench = _Blocks(gpu, case, tiny)
    report.put("blocks", name, bench.loading)
    report.put("blocks", f"{name}: trials", bench.trials)
    for context in bench.contexts:
        report.attempt("blocks", f"{name}: context {context:,}", lambda context=context: bench.steps(context))  # type: ignore[misc]
    report.attempt("blocks", f"{name}: {_SESSIONS} sessions", bench.sessions)
    if gpu.is_real:
        report.attempt("blocks", f"{name}: a decode step", bench.launches)
    report.attempt("blocks", f"{name}: training", bench.training)
    if case.count > 1:
        report.attempt("blocks", f"{name}: training block by block", bench.training_block_by_block)
    if case.model.startswith("Llama"):
        report.attempt("blocks", f"{name}: training of 4 clients", bench.training_together)
    report.attempt("blocks", f"{name}: trials", bench.compile, needs=60)
    return {}


class _Blocks:
    """Blocks in the middle of a model, and what a peer runs them with."""

    def __init__(self, gpu: Gpu, case: Case, tiny: bool):
        self._gpu, self._case, self._tiny = gpu, case, tiny
        self.contexts = (16,) if tiny else (128, 2048)
        config = shaped(case.model, tiny)
        checkpoint = RandomCheckpoint.of(config, gpu.name)
        before, begin = gpu.allocated(), gpu.clock()
        with gpu.peak_here() as peak:
            self._span = span = load_span(
                checkpoint, 2, 2 + case.count, dtype=torch.bfloat16, device=gpu.name, quantization=case.quantize
            )
        seconds = gpu.clock() - begin
        self._total = checkpoint.model_id.num_blocks
        weights = gpu.allocated() - before
        speed, token_bytes = measure(span)
        self.loading: Figures = {
            "s to make and load a block": seconds / case.count,
            "GB of a block": weights / case.count / _GB,
            "as foreseen": block_bytes(checkpoint, torch.bfloat16, case.quantize) / _GB,
            "GB at most while loading": peak.size / _GB,
            "KV KiB per token and block": token_bytes / case.count / 2**10,
            "announced: decoded blocks/s": speed.decode,
            "forward block tokens/s": speed.forward,
        }
        slots = 512 if tiny else 8192
        arena, self._joiner, self.trials = try_arena_and_joining(span, slots)
        self._memory = CacheMemory(slots, slots, 30.0, arena)
        self._store = AdapterStore(span, 2**30, 64, 2**30)
        self._runner = StepRunner(span, self._store, self._joiner)

    def steps(self, context: int) -> Figures:
        """Of one session: per block, and what a peer adds to its blocks; the whole model's steps that follow."""
        block, fixed = self._decode_seconds(context)
        prefill = self._gpu.seconds(lambda: self._session(self._span.blocks, context).close(), rounds=3, warm=1)
        hidden, alone = self._span.hidden_size, self._total * block + fixed
        found = {
            "decode ms per block": 1000 * block,
            "and per peer": 1000 * fixed,
            "prefill ms per block": 1000 * prefill / self._case.count,
            f"steps/s of {self._total} blocks": 1 / alone,
        }
        for name, link in LINKS.items():
            seconds = self._total * block + _PEERS * fixed + link_seconds(hidden, _PEERS, *link)
            found[f"over {_PEERS} peers, {name}:"] = 1 / seconds
        return found

    def _decode_seconds(self, context: int) -> tuple[float, float]:
        """A block's, and what there is beside the blocks: copies, the trunk without its blocks."""
        blocks, count = self._span.blocks, self._case.count
        whole = self._step_seconds([self._session(blocks, context)], blocks)
        if count == 1:
            return whole, 0.0
        one = self._step_seconds([self._session(blocks[:1], context)], blocks[:1])
        block = (whole - one) / (count - 1) if one < whole else whole / count
        return block, max(0.0, one - block)

    def sessions(self) -> Figures:
        """Several sessions at once, against one alone."""
        blocks, context = self._span.blocks, self.contexts[0]
        one = self._step_seconds([self._session(blocks, context)], blocks)
        many = self._step_seconds([self._session(blocks, context) for _ in range(_SESSIONS)], blocks)
        return {"a step ms": 1000 * many, "of one alone": 1000 * one, "times": many / one}

    def launches(self) -> Figures:
        """What a step hands to the GPU and how often it waits, in which the time may lie that is not computing."""
        blocks = self._span.blocks
        session = self._session(blocks, self.contexts[0])
        for _ in range(3):
            self._step([session], blocks)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            begin = self._gpu.clock()
            self._step([session], blocks)
            seconds = self._gpu.clock() - begin
        session.close()
        events = profiled.key_averages()
        counts = {event.key: event.count for event in events}
        launches = sum(count for key, count in counts.items() if "Launch" in key or "MemcpyAsync" in key)
        # The clock waits for the whole device, everything else for a stream or an event.
        waits = sum(count for key, count in counts.items() if key.endswith(("StreamSynchronize", "EventSynchronize")))
        busy = [event.self_device_time_total for event in events if event.device_type.name == "CUDA"]
        return {
            "launches and copies per block": launches / len(blocks),
            "waits": waits,
            "GPU busy ms": sum(busy) / 1000,
            "of, profiled": 1000 * seconds,
        }

    def training(self) -> Figures:
        """A micro-batch with all its activations kept."""
        rows, tokens = (1, 32) if self._tiny else (2, 512)
        call, trainer = self._call(rows, tokens), Trainer(self._span, self._store, _UNBOUNDED, _UNBOUNDED)
        foreseen, before = trainer.footprint.of(call), self._gpu.allocated()
        _, call_id = trainer.forward(call, "me", keep=True)
        real = self._gpu.allocated() - before
        counted = trainer.kept.take(call_id, "me", call.inputs.hidden).size
        count = self._case.count
        forward = self._gpu.seconds(lambda: trainer.forward(call, "me", keep=False), rounds=3, warm=1)
        with self._gpu.peak_here() as peak:
            both = self._gpu.seconds(lambda: self._train(trainer, call), rounds=3, warm=1)
        return {
            f"{rows}x{tokens}: forward ms per block": 1000 * forward / count,
            "with backward": 1000 * both / count,
            "tokens/s of a block": rows * tokens * count / both,
            "MB kept per block": real / count / _MB,
            "counted": counted / count / _MB,
            "foreseen": foreseen / count / _MB,
            "at most": peak.size / count / _MB,
        }

    def training_block_by_block(self) -> Figures:
        """A long row in as little memory as a peer can have for it: each block is computed again in backward."""
        tokens = 64 if self._tiny else 2048
        call = self._call(1, tokens)
        whole = Trainer(self._span, self._store, _UNBOUNDED, _UNBOUNDED).footprint
        trainer = Trainer(self._span, self._store, *[whole.of_checkpoints(call)] * 2)
        with self._gpu.peak_here() as peak:
            both = self._gpu.seconds(lambda: self._train(trainer, call), rounds=3, warm=1)
        return {
            f"1x{tokens}: ms per block": 1000 * both / self._case.count,
            "MB at most": peak.size / _MB,
            "foreseen": whole.of_checkpoints(call) / _MB,
            "with all kept": whole.of(call) / _MB,
        }

    def training_together(self) -> Figures:
        """Small calls of four clients, one by one and together."""
        bench = Bench(self._span, 4, self._gpu.clock)
        found = {}
        for tokens in (4,) if self._tiny else (16, 128, 512):
            rounds = [bench.times(tokens, joined)[1] for _ in range(4) for joined in (False, True)][2:]
            alone, together = min(rounds[::2]), min(rounds[1::2])
            found[f"{tokens} tokens: one by one ms"] = 1000 * alone
            found["together"] = 1000 * together
            found[f"{tokens} tokens: times as fast"] = alone / together
        return found

    def compile(self) -> Figures:
        """Last, as it takes the longest, and its CUDA graphs keep memory."""
        return try_compiling(self._span, self._joiner, "eager" if self._tiny else "inductor")

    def _session(self, blocks: range, context: int) -> Session:
        """One that has a prompt behind it."""
        session = Session(self._memory, SpanCache(self._span.config, blocks))
        session.reserve(1, context + 64)
        self._run([Step(session, self._inputs(context), Mode(blocks))])
        return session

    def _step_seconds(self, sessions: Sequence[Session], blocks: range) -> float:
        """Of a decode step of all sessions, which are closed."""
        seconds = self._gpu.seconds(lambda: self._step(sessions, blocks), rounds=15, warm=3)
        for session in sessions:
            session.close()
        return seconds

    def _step(self, sessions: Sequence[Session], blocks: range) -> None:
        self._run([Step(session, self._inputs(1), Mode(blocks)) for session in sessions])

    def _run(self, steps: list[Step]) -> None:
        for outcome in self._runner.run(steps):
            if isinstance(outcome, Exception):
                raise outcome

    def _inputs(self, tokens: int) -> Inputs:
        """As they come from a client: in this process's memory."""
        return Inputs(torch.randn(1, tokens, self._span.hidden_size).to(self._span.dtype))

    def _call(self, rows: int, tokens: int) -> TrainingCall:
        span = self._span
        hidden = torch.randn(rows, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
        return TrainingCall(Inputs(hidden), Mode(span.blocks, training=True), None, {})

    def _train(self, trainer: Trainer, call: TrainingCall) -> None:
        hidden, call_id = trainer.forward(call, "me", keep=True)
        trainer.backward_kept(call_id, "me", hidden)
