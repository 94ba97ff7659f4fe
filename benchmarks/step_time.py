"""Where one decode step goes, in microseconds, part by part of our own code:

python -m benchmarks.step_time --hidden 1024 --layers 16 --span 0:8

Every part is run by itself, in this process, over and over; the fastest run counts, as the others were disturbed. The
carrier is a stream in memory here: what libp2p adds is not in the table. A random Llama is made at first use.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from client.generation.history import History
from client.swarm.loop import LOOP
from peer.compute.scheduler import Priority, Scheduler
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.span_cache import SpanCache
from peer.span.checks import check_inputs, check_mode
from peer.span.loading import load_span
from peer.span.span import Inputs, Mode
from peer.start.arena_trial import arena_for
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.machine.timing import fastest
from protocol.model.checkpoint import open_checkpoint
from protocol.tensors import Limits
from tests.tools.families import build_llama
from tests.tools.fuzzing.carrier import connect

_RUNS = 200


def microseconds(work: Callable[[], Any], runs: int = _RUNS) -> float:
    """Of the fastest run."""
    return 1e6 * fastest(work, runs, budget=float("inf"))


async def fastest_of(work: Callable[[], Awaitable[Any]]) -> float:
    """Microseconds of the fastest run of something awaited."""
    best = float("inf")
    for _ in range(_RUNS):
        begin = time.perf_counter()
        await work()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


async def nothing() -> None:
    """A hop to the client's loop and back, and no work."""


async def time_wire(hidden: torch.Tensor, context: pb.Context) -> dict[str, float]:
    """Encoding, sending and decoding a step and its answer, over a stream in memory."""
    near, far = connect("client", "peer")
    client, peer = Channel(near, Limits(), 10), Channel(far, Limits(), 10)
    tensors = {"hidden_states": hidden, "position_ids": torch.zeros(1, 1, dtype=torch.long)}

    async def request() -> Message:
        await client.send(Message(pb.Step(context=context, number=1), tensors))
        return await peer.receive_request()

    async def send_request() -> None:
        await client.send(Message(pb.Step(context=context, number=1), tensors))
        far.pending.clear()

    async def answer() -> Message:
        await peer.send(Message(pb.Result(), {"hidden_states": hidden}))
        return await client.receive_answer()

    async def send_answer() -> None:
        await peer.send(Message(pb.Result(), {"hidden_states": hidden}))
        near.pending.clear()

    encoded, asked = await fastest_of(send_request), await fastest_of(request)
    answered, received = await fastest_of(send_answer), await fastest_of(answer)
    scheduler = Scheduler()
    queue = await fastest_of(lambda: scheduler.submit(Priority.STEP, lambda: None, "client"))
    scheduler.close()
    return {
        "client: message, encode, send": encoded,
        "peer: receive, check, decode": asked - encoded,
        "peer: queue, compute thread and back": queue,
        "peer: answer, encode, send": answered,
        "client: receive, check, decode": received - answered,
    }


@torch.no_grad()
def time_span(path: Path, blocks: range, context: int, dtype: torch.dtype) -> dict[str, float]:
    """What the compute thread does for a step at `context` cached tokens."""
    span = load_span(open_checkpoint(str(path)), blocks.start, blocks.stop, dtype=dtype)
    memory = CacheMemory(context + 1000, context + 1000, 1e9, arena_for(span, context + 1000))
    mode, hidden = Mode(blocks), torch.randn(1, 1, span.hidden_size, dtype=dtype)
    message = Message(pb.Step(), {"hidden_states": hidden})

    def whole(cache: SpanCache, run: Mode) -> Callable[[], Any]:
        def step() -> None:
            span.run(Inputs(hidden), run, cache)
            for layer in cache.own_layers():
                layer.crop(-1 if run.blocks else 0)

        return step

    prompt = torch.randn(1, context, span.hidden_size, dtype=dtype)
    plain = SpanCache(span.model.config, blocks)
    session = Session(memory, SpanCache(span.model.config, blocks))
    session.reserve(1, context + 1)
    for cache in (plain, session.cache):
        span.run(Inputs(prompt), mode, cache)
    skipped = microseconds(whole(session.cache, Mode(range(blocks.start, blocks.start))))
    asked = pb.Context(start=blocks.start, end=blocks.stop)
    in_arena, in_plain = (microseconds(whole(cache, mode), 50) for cache in (session.cache, plain))
    return {
        "peer: checks": microseconds(lambda: (check_mode(span, asked), check_inputs(span, message, 0, 100))),
        "peer: memory reserved": microseconds(lambda: session.reserve(1, context + 1)),
        "peer: trunk without a block, others skipped": skipped,
        f"peer: its {len(blocks)} blocks": in_arena - skipped,
        "(its blocks with Transformers' own cache)": in_plain - skipped,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--span", default="0:8")
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, _, end = options.span.partition(":")
    dtype, blocks = getattr(torch, options.dtype), range(int(start), int(end))
    with tempfile.TemporaryDirectory() as root:
        path = build_llama(
            Path(root), name="llama", hidden=options.hidden, layers=options.layers, heads=max(1, options.hidden // 64),
            intermediate=options.hidden * 11 // 4, vocab=1000, dtype=dtype,
        )  # fmt: skip
        hidden, history = torch.randn(1, 1, options.hidden, dtype=dtype), History()
        table = {"client: to its loop and back": microseconds(lambda: LOOP.run(nothing()))}
        table |= asyncio.run(time_wire(hidden, pb.Context(start=blocks.start, end=blocks.stop)))
        table |= time_span(path, blocks, options.context, dtype)
        table["client: history"] = microseconds(lambda: history.then(hidden))
    for part, time_taken in table.items():
        print(f"{part:<46}{time_taken:>10.1f}")


if __name__ == "__main__":
    main()
