"""Assembling what serves a span: its blocks are loaded, its speed is measured, everything optional is tried out."""

import logging
from dataclasses import dataclass
from functools import partial

from bootstrap.member import Member
from peer.adapters.store import AdapterStore
from peer.compute.scheduler import Priority, Scheduler
from peer.generation.joined.packing import Packer
from peer.generation.steps import StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.service.adapters import Adapters
from peer.service.base_weights import BaseWeights
from peer.service.generation import Generation
from peer.service.handover import HandOver, Mailbox, Outbox
from peer.service.quotas import Accounts
from peer.service.reception import Reception
from peer.service.service import Service
from peer.service.training import Training
from peer.span.loading import load_span
from peer.span.span import Span
from peer.start.arena_trial import arena_for
from peer.start.joining_trial import find_joiner
from peer.start.memory import ROW, Budget, DeviceMemory, return_freed_memory
from peer.start.options import ServeOptions
from peer.start.placement import find_blocks_to_serve
from peer.start.speed import measure
from peer.training.footprint import plain_call
from peer.training.joined.together import Together
from peer.training.runner import TrainingRunner
from peer.training.trainer import Trainer
from protocol.errors import first_line
from protocol.machine.devices import describe, devices, make_current
from protocol.model.checkpoint import Checkpoint
from protocol.model.split_linear import split_linears
from protocol.records import ModelVersion, Speed
from protocol.tensors import Limits

logger = logging.getLogger(__name__)

_JOINED, _JOINED_ON_CPU = 512, 64
"""Tokens, on GPUs and on CPUs, that may ride in a trunk pass along with those whose turn it is. Up to about so many
they cost far less than alone, as the weights are read once. Training calls of more tokens are not run together, a
client's full micro-batches (1,024) among them: their products take the time of their arithmetic and not that of reading
weights, so there is nothing to gain (docs/performance.md, "Training calls of several clients")."""


@dataclass(frozen=True)
class Assembled:
    """A span that is ready to be served, and what serves it."""

    span: Span
    speed: Speed
    service: Service
    budget: Budget


def new_scheduler(options: ServeOptions) -> Scheduler:
    """The compute thread for a peer's device."""
    joined_size = _JOINED_ON_CPU if options.torch_device.type == "cpu" else _JOINED
    return Scheduler(joined_size, at_rest=return_freed_memory)


async def assemble(options: ServeOptions, checkpoint: Checkpoint, member: Member, scheduler: Scheduler) -> Assembled:
    """Load the blocks that `options` or the swarm's need names, and what serves them; on the compute thread.

    Raises `BadUsage`, `UnsupportedModel`, `PeerUnreachable`.
    """
    named = options.span(checkpoint.model_id.num_blocks)
    blocks = named or await find_blocks_to_serve(options, checkpoint, member)
    span = await scheduler.submit(Priority.CALL, partial(_load_span, options, checkpoint, blocks))
    return await scheduler.submit(Priority.CALL, partial(_assemble, options, checkpoint, span, scheduler, member))


def _load_span(options: ServeOptions, checkpoint: Checkpoint, blocks: range) -> Span:
    make_current(options.torch_device)
    span = load_span(
        checkpoint,
        blocks.start,
        blocks.stop,
        dtype=options.weights_dtype,
        device=str(options.torch_device),
        quantization=options.quantize,
        double_quantization=options.double_quantize,
    )
    split_linears(span.model)
    logger.info("computing on %s in %s", describe(span.device), str(span.dtype).removeprefix("torch."))
    others = [device for device in devices() if device.type == span.device.type and device != span.device]
    if options.device == "auto" and others:
        every = ",".join(map(str, [span.device, *others]))
        logger.info("left alone: %s; with --device %s each has a peer", ", ".join(map(describe, others)), every)
    return span


def _assemble(
    options: ServeOptions, checkpoint: Checkpoint, span: Span, scheduler: Scheduler, member: Member
) -> Assembled:
    speed, token_bytes = measure(span)
    return_freed_memory()
    row_bytes = _row_bytes(span, options.max_length)
    found = DeviceMemory.of(span.device)
    free = found.within(options.memory_limit)
    budget = Budget.of(free, token_bytes, options.cache_tokens, options.max_length, row_bytes)
    quota, tokens, max_length = options.quota, budget.cache_tokens, budget.max_length
    memory = CacheMemory(tokens, max_length, options.idle_timeout, arena_for(span, tokens), quota.cache_tokens)
    version = ModelVersion(checkpoint.model_id, checkpoint.digests)
    limits = Limits(max_payload=options.max_message or Limits.max_payload)
    adapter_bytes = budget.adapters // 2
    store = AdapterStore(span, adapter_bytes, quota.adapters, quota.adapter_bytes or adapter_bytes)
    adapters, hand_over = Adapters(store), HandOver(Mailbox(limits.max_payload), Outbox(member, version))
    trainer = Trainer(span, store, max_kept_bytes=budget.kept, max_bytes=budget.kept + budget.call)
    runner = TrainingRunner(trainer, Together(span, scheduler.joined_size) if options.joins_training else None)
    service = Service(
        Reception(version, span, max_length, Accounts(quota), limits),
        scheduler,
        Generation(span, memory, adapters, _step_runner(span, store, trainer, options.compile), hand_over),
        Training(span, max_length, adapters, runner, hand_over),
        adapters,
        BaseWeights(span),
        hand_over,
        span,
    )
    logger.info("%s", budget.describe())
    if others := found.others(span.device):
        logger.warning("%s", others)
    if row_bytes:
        trainer.measure(max_length)
        _tell_of_training(span, trainer, min(ROW, max_length))
    return_freed_memory()  # what was tried out took some, too
    return Assembled(span, speed, service, budget)


def _row_bytes(span: Span, max_length: int) -> int:
    """What it takes to train a row of the usual most tokens; 0, and a warning, for a span that cannot be trained."""
    try:
        return Trainer(span, AdapterStore(span, 0, 0, 0), 0, 0).footprint.of_row(min(ROW, max_length))
    except Exception as failure:  # any failure at all: who does not train need not care
        logger.warning("this span cannot be trained: %s", first_line(failure))
        return 0


def _tell_of_training(span: Span, trainer: Trainer, wished: int) -> None:
    trainable, size = trainer.trainable, trainer.footprint.of(plain_call(span, 1, 1024)) / len(span.blocks)
    assert trainable is not None, "it has been measured"
    what = "training keeps %.1f MB of 1,024 tokens and block: rows of up to %s tokens, %s tokens of all rows in flight"
    logger.info(what, size / 1e6, f"{trainable.row:,}", f"{trainable.tokens:,}")
    if trainable.row < wished:
        logger.warning("longer rows than %s tokens do not fit in training; serve fewer blocks", f"{trainable.row:,}")


def _step_runner(span: Span, adapters: AdapterStore, trainer: Trainer, compiles: bool) -> StepRunner:
    joiner, compiled = find_joiner(span), None
    if compiles and isinstance(joiner, Packer):
        from peer.start.compile_trial import compile_steps  # brings the compiler with it

        compiled = compile_steps(span)
    return StepRunner(span, adapters, joiner, compiled, trainer.give_way)
