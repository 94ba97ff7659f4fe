"""A peer: loads a span, joins the swarm, announces itself, serves until it is told to stop."""

import asyncio
import contextlib
import ctypes
import importlib
import logging
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from bootstrap.directory import Announcer
from bootstrap.member import Member
from peer.adapters import AdapterStore
from peer.arena_trial import arena_for
from peer.call_runner import CallRunner
from peer.calls import Trainer
from peer.handover import Mailbox, Outbox
from peer.kv_cache import CacheMemory
from peer.loading import block_bytes, load_span
from peer.packing import Packer
from peer.packing_check import find_joiner
from peer.placement import choose_blocks
from peer.quotas import Accounts, Quota
from peer.reception import Reception, Served
from peer.scheduler import Priority, Scheduler
from peer.service import Service
from peer.span import Span
from peer.steps import StepRunner
from peer.throughput import measure
from protocol.errors import PeerFailed
from protocol.imports import without_collection
from protocol.model.checkpoint import Checkpoint
from protocol.model.split_linear import split_linears
from protocol.records import PeerRecord, PeerState, Speed
from protocol.tensors import Limits

logger = logging.getLogger(__name__)

_ANNOUNCE_PERIOD, _RECORD_LIFETIME = 20.0, 60.0
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


def own_version() -> str:
    """The installed version of swarmtune."""
    try:
        return version("swarmtune")
    except PackageNotFoundError:
        return "0+source"


class Server:
    """A running peer. Make one with `start`."""

    def __init__(self, options: ServeOptions, loaded: "_Loaded", member: Member):
        self.options, self.member = options, member
        self.span, self.service = loaded.span, loaded.service
        self._speed, self._scheduler = loaded.speed, loaded.scheduler
        self._state = PeerState.ONLINE
        self._preload: asyncio.Task[object] | None = None
        """Imports what the first adapter needs, PEFT above all, while the peer serves already."""
        self._announcer = Announcer(member.directory, self.record, _ANNOUNCE_PERIOD, _RECORD_LIFETIME)

    @classmethod
    async def start(cls, options: ServeOptions, joining: asyncio.Task[Member]) -> "Server":
        """Load and announce once `joining` is done. Raises as it does, and `UnsupportedModel`."""
        on_cpu = torch.device(options.device).type == "cpu"
        scheduler = Scheduler(joined_size=_JOINED_ON_CPU if on_cpu else _JOINED)
        try:
            member = await joining  # first: what loads cannot be stopped, and most of a join is over by now
            blocks = options.blocks or await _choose_blocks(options, member)
            span = await scheduler.submit(Priority.CALL, partial(_load_span, options, blocks))
            loaded = await scheduler.submit(Priority.CALL, partial(_load, options, span, scheduler, member))
            server = cls(options, loaded, member)
            await member.transport.serve(server.service.handle)
            await member.directory.announce(server.record(), _RECORD_LIFETIME)
        except BaseException:
            scheduler.close()
            raise
        server._announcer.start()
        server._preload = asyncio.create_task(asyncio.to_thread(_import_adapters))
        return server

    def record(self) -> PeerRecord:
        """What this peer announces now."""
        return PeerRecord(
            peer_id=self.member.peer_id,
            name=self.options.name,
            model=self.options.checkpoint.model_id,
            start=self.span.start,
            end=self.span.end,
            state=self._state,
            dtype=str(self.span.dtype).removeprefix("torch."),
            quantization=self.options.quantization,
            addresses=tuple(self.member.addresses)[:20],
            direct=self.member.door,
            speed=self._speed,
            free_cache_tokens=self.service.memory.free_tokens,
            max_length=self.service.memory.max_length,
            sessions=self.service.load.sessions,
            version=own_version(),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then leave. Raises `PeerFailed` when the p2pd process is lost."""
        waiting = [asyncio.create_task(stop.wait()), asyncio.create_task(self.member.lost.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        lost = self.member.lost.is_set()
        await self.leave()
        if lost:
            raise PeerFailed("The p2pd process died, so nobody can reach this peer any more; start the peer again.")

    async def leave(self) -> None:
        """Take no new work, let clients take their sessions elsewhere, withdraw the record, close everything."""
        self.service.draining = True
        self._state = PeerState.DRAINING
        self._announcer.refresh()
        await self._drain()
        tally = self.service.tally
        logger.info("ran %d steps of generations in %d calls", tally.steps, tally.calls)
        tally = self.service.call_tally
        logger.info("ran %d training calls in %d goes", tally.steps, tally.calls)
        await self._announcer.stop()
        self._scheduler.close()
        await self.member.shutdown()

    async def _drain(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.options.drain_timeout
        while self.service.is_busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


def _import_adapters() -> None:
    with without_collection():
        importlib.import_module("peer.trees")


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
    from peer.compiled import compile_steps  # brings the compiler with it

    return StepRunner(span, adapters, joiner, compile_steps(span) if isinstance(joiner, Packer) else None)


def _return_freed_memory() -> None:
    """Have the C library give back what it holds: quantizing leaves a multiple of each block's size behind."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
