"""TODO."""

import asyncio
import contextlib
import ctypes
import logging
from dataclasses import dataclass

import psutil
import torch

from bootstrap.member import Member
from peer.adapters.store import AdapterStore
from peer.compute.scheduler import Scheduler
from peer.generation.joined.packing import Packer
from peer.generation.steps import StepRunner
from peer.kv_cache.memory import CacheMemory
from peer.service.handover import Mailbox, Outbox
from peer.service.quotas import Accounts, Quota
from peer.service.reception import Reception, Served
from peer.service.service import Service
from peer.span.loading import block_bytes, load_span
from peer.span.span import Span
from peer.start.arena_trial import arena_for
from peer.start.joining_trial import find_joiner
from peer.start.placement import choose_blocks
from peer.start.speed import measure
from peer.training.runner import CallRunner
from peer.training.trainer import Trainer
from protocol.machine.split_linear import split_linears
from protocol.model.checkpoint import Checkpoint
from protocol.records import Speed
from protocol.tensors import Limits

logger = logging.getLogger(__name__)

_WEIGHTS_SHARE = 0.6
"""Of the memory that is free at first, for weights, when nobody says how many blocks to serve."""


_CACHE_SHARE = 0.25
"""Of the memory that is free after loading, for KV caches; the same again for kept activations and for adapters."""


_JOINED, _JOINED_ON_CPU = 512, 64
"""Tokens that may ride in a call along with those whose turn it is. Up to about so many they cost far less than alone,
as the weights are read once."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `peer serve` is told."""

    checkpoint: Checkpoint
    blocks: range | None
    """None: those that the swarm needs most, `num_blocks` of them."""
    num_blocks: int | None
    """None: as many as fit the memory."""
    dtype: torch.dtype | None
    device: str
    quantization: str
    double_quantization: bool
    name: str
    max_length: int
    """Tokens of one session."""
    cache_tokens: int | None
    """Tokens of all sessions; None: what a share of the free memory holds."""
    idle_timeout: float
    """Seconds after which a session may have to give its memory to others."""
    quota: Quota
    max_message: int
    """Bytes of the tensors of one message."""
    drain_timeout: float
    """Seconds that clients get to take their sessions elsewhere when the peer leaves."""
    compile: bool
    """Whether decode steps are to be run by `torch.compile`, where that pays."""


@dataclass(frozen=True)
class _Loaded:
    span: Span
    speed: Speed
    service: Service
    scheduler: Scheduler


async def _choose_blocks(options: ServeOptions, member: Member) -> range:
    peers = await member.directory.peers(options.checkpoint.model_id.config_hash)
    total = options.checkpoint.model_id.num_blocks
    count = options.num_blocks
    if count is None:
        memory = _free_memory(torch.device(options.device)) * _WEIGHTS_SHARE
        block = await asyncio.to_thread(block_bytes, options.checkpoint, options.dtype, options.quantization)
        count = max(1, min(total, int(memory // block)))
    return choose_blocks(peers, total, count)


def _load_span(options: ServeOptions, blocks: range) -> Span:
    span = load_span(
        options.checkpoint,
        blocks.start,
        blocks.stop,
        dtype=options.dtype,
        device=options.device,
        quantization=options.quantization,
        double_quantization=options.double_quantization,
    )
    split_linears(span.model)
    return span


def _load(options: ServeOptions, span: Span, scheduler: Scheduler, member: Member) -> _Loaded:
    speed, token_bytes = measure(span)
    _return_freed_memory()
    share = int(_free_memory(span.device) * _CACHE_SHARE)
    total = options.cache_tokens if options.cache_tokens is not None else max(options.max_length, share // token_bytes)
    adapters = AdapterStore(span, max_bytes=share, quota=options.quota)
    memory = CacheMemory(total, min(options.max_length, total), options.idle_timeout, arena_for(span, total))
    served = Served(options.checkpoint.model_id, options.checkpoint.digests)
    limits = Limits(max_payload=options.max_message)
    service = Service(
        Reception(served, span, Accounts(options.quota, memory), limits, member.handshake),
        span,
        memory,
        adapters,
        CallRunner(Trainer(span, adapters, max_kept_bytes=share), scheduler.joined_size),
        _step_runner(span, adapters, options.compile),
        scheduler,
        Mailbox(options.max_message),
        Outbox(member, served.model_id, served.digests),
    )
    _return_freed_memory()  # what was tried out took some, too
    return _Loaded(span, speed, service, scheduler)


def _step_runner(span: Span, adapters: AdapterStore, compiles: bool) -> StepRunner:
    joiner = find_joiner(span)
    if not compiles:
        return StepRunner(span, adapters, joiner)
    from peer.start.compile_trial import compile_steps  # brings the compiler with it

    return StepRunner(span, adapters, joiner, compile_steps(span) if isinstance(joiner, Packer) else None)


def _return_freed_memory() -> None:
    """Have the C library give back what it holds: quantizing leaves a multiple of each block's size behind."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
