"""Requests of random kind and size to a peer on the pretended GPU, with too little memory for many of them:

python -m benchmarks.out_of_memory --calls 1000 --seed 1

Each is answered with the numbers that it had when memory was ample, or refused with a typed error; afterwards the
peer serves, and holds what it held before.

What a peer foresees keeps it from most of this. So memory is taken away when the peer has been sized, as another
program would take it.
"""

import tests.tools.pretended_gpu  # noqa: F401  before torch

# isort: split
import argparse
import asyncio
import gc
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bootstrap.member import Member, MemberOptions
from client.swarm.loop import LOOP
from peer.compute.scheduler import Priority
from peer.start.options import ServeOptions
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import OutOfMemory, SessionLost, SwarmError, TooLong, UnknownAdapter, UnknownCall
from protocol.model.checkpoint import open_checkpoint
from protocol.tensors import Limits
from tests.tools.families import build_family
from tests.tools.own_peer import start_server
from tests.tools.pretended_gpu import device
from tests.tools.spans import END, START, states
from tests.tools.wire import OPEN, TARGET, context, forward, manifest, put, step

SIZES = [(rows, tokens) for rows in (1, 3, 8) for tokens in (4, 60, 250)]
"""Rows, and tokens of each."""
TYPED = (OutOfMemory, TooLong, SessionLost, UnknownCall, UnknownAdapter)
"""What a client can do something about: go elsewhere, send again."""
SHARES = (0.005, 0.3)
"""Of the memory that the largest request takes, each has something between these, so that it fails anywhere."""
_DECODES = 3
_PATIENCE = 20.0
_Answer = dict[str, torch.Tensor]


class Table:
    """A peer in this process, and a client that asks it for one thing after the other."""

    def __init__(self, model: Path, options: ServeOptions):
        self._model, self._options = model, options

    async def __aenter__(self) -> "Table":
        self.server = await start_server(self._model, self._options)
        self._member = await Member.join(MemberOptions(tuple(self.server.member.addresses[:1]), client_mode=True))
        await self._member.directory.peers(self.server.model_id.config_hash)  # learns where the peer's door is
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.channel.close()
        await self._member.shutdown()
        await self.server.leave(at_once=True)

    async def connect(self) -> None:
        """A stream to the peer."""
        self.channel = Channel(await self._member.transport.connect(self.server.member.peer_id), Limits(), _PATIENCE)
        version = self.server.model_id.config_hash, open_checkpoint(str(self._model)).digests
        await self.channel.call(Message(pb.Hello(version=VERSION, config_hash=version[0], weights=version[1])))

    async def settle(self) -> int:
        """Bytes that the peer holds when its client has gone and nothing is under way."""
        self.channel.close()
        await asyncio.sleep(2 * self.server.options.idle_timeout)
        await self.server._scheduler.submit(Priority.CALL, lambda: None)
        await self.connect()
        return device.bytes_now()

    async def ask(self, kind: str, rows: int, tokens: int) -> _Answer:
        """What the peer answers; raises `SwarmError`."""
        return await KINDS[kind](self, rows, tokens)

    async def forward(self, rows: int, tokens: int) -> _Answer:
        return await self._call(forward(_inputs(rows, tokens)))

    async def forward_and_backward(self, rows: int, tokens: int) -> _Answer:
        message = forward(_inputs(rows, tokens), keep=True, training=True, dropout_seed=rows)
        call_id = (await self.channel.call(message)).body.call_id
        if not call_id:
            raise UnknownCall("It was not kept.")
        body = pb.Backward(context=context(training=True, dropout_seed=rows), call_id=call_id)
        return await self._call(Message(body, {"grad": states(rows, tokens, 2)}))

    async def kept_forward(self, rows: int, tokens: int) -> _Answer:
        """No backward follows: what is kept must give way to others."""
        return await self._call(forward(_inputs(rows, tokens), keep=True, training=True))

    async def backward(self, rows: int, tokens: int) -> _Answer:
        tensors = _inputs(rows, tokens) | {"grad": states(rows, tokens, 2)}
        return await self._call(Message(pb.Backward(context=context(training=True, dropout_seed=rows)), tensors))

    async def generation(self, rows: int, tokens: int) -> _Answer:
        await self.channel.call(OPEN)
        answers = [await self._call(step(1, hidden=states(rows, tokens, 1)))]
        await self.channel.call(Message(pb.ForkSession()))
        for number in range(2, 2 + _DECODES):
            answers.append(await self._call(step(number, hidden=states(rows, 1, number))))
        return {str(number): answer["hidden_states"] for number, answer in enumerate(answers)}

    async def adapter(self, rows: int, tokens: int) -> _Answer:
        """Is put, and trained."""
        rank, chance = tokens, torch.Generator().manual_seed(rows)
        tensors = [torch.randn(shape, generator=chance) for shape in ((rank, 32), (32, rank))]
        asked = put(manifest(options={"r": rank, "lora_alpha": rows}), *tensors)
        key = (await self.channel.call(asked)).body.token
        return await self._call(
            Message(
                pb.Backward(context=context(training=True, adapter=key)),
                _inputs(rows, tokens) | {"grad": states(rows, tokens, 2)},
            )
        )

    async def base_weight(self, rows: int, tokens: int) -> _Answer:
        """Its norms, and its leading factors."""
        name = f"{TARGET}.weight"
        norms = await self._call(Message(pb.ReadWeight(names=[name], norm_dims=[1], dtype=pb.FLOAT32)))
        return norms | await self._call(Message(pb.Factorize(name=name, factorization=pb.QR, rank=rows)))

    async def _call(self, message: Message) -> _Answer:
        return (await self.channel.call(message)).tensors


def _inputs(rows: int, tokens: int) -> _Answer:
    return {"hidden_states": states(rows, tokens, 1)}


KINDS: dict[str, Callable[[Table, int, int], Awaitable[_Answer]]] = {
    "forward": Table.forward,
    "forward and backward": Table.forward_and_backward,
    "forward that is kept": Table.kept_forward,
    "backward": Table.backward,
    "generation": Table.generation,
    "adapter": Table.adapter,
    "base weight": Table.base_weight,
}


@dataclass
class Report:
    """What came of the requests."""

    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    """Of refusals."""
    before: int = 0
    after: int = 0
    limits: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def leaked(self) -> bool:
        """Whether more is held than before, by over one per cent."""
        return self.after > self.before * 1.01

    def print(self) -> None:
        """As a Markdown table."""
        print("| request | answered | refused |\n|---|---|---|")
        for kind in KINDS:
            print(f"| {kind} | {self.answered[kind]} | {self.refused[kind]} |")
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        print(f"\nRefused as: {kinds}. In {self.seconds:.0f} s.")
        low, high = self.limits
        print(f"Bytes held before: {self.before:,}, afterwards: {self.after:,}; limit: {low:,} to {high:,}.")
        for problem in self.problems:
            print(f"\n{problem}")


async def run(model: Path, calls: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES) -> Report:
    """So many requests."""
    chance, report = random.Random(seed), Report()
    wishes = [(kind, *size) for kind in KINDS for size in sizes]
    options = ServeOptions(
        blocks=f"{START}:{END}", device="cuda:0", max_length=512, cache_tokens=20_000, idle_timeout=0.5
    )
    async with Table(model, options) as table:
        expected = {wish: await table.ask(*wish) for wish in wishes}
        await table.settle()
        gc.collect()  # also of what was in this process before
        report.before = await table.settle()
        device.reset()
        await table.ask("backward", *max(sizes))
        most = device.bytes_most() - report.before
        gc.collect()
        gc.disable()  # what only a collection frees has leaked
        ample = device.bytes_limit()
        report.limits = report.before + int(most * SHARES[0]), report.before + int(most * SHARES[1])
        begin = time.monotonic()
        try:
            for _ in range(calls):
                wish = chance.choice(wishes)
                device.limit(chance.randint(*report.limits))
                await _ask(table, wish, expected[wish], report)
        finally:
            device.limit(ample)
            report.seconds = time.monotonic() - begin
        report.after = await table.settle()
        gc.enable()
        for wish in wishes:
            if not _equal(await table.ask(*wish), expected[wish]):
                report.problems.append(f"{wish}: other numbers after the run")
    return report


async def _ask(table: Table, wish: tuple[str, int, int], expected: _Answer, report: Report) -> None:
    kind = wish[0]
    try:
        found = await table.ask(*wish)
    except SwarmError as error:
        report.refused[kind] += 1
        report.kinds[type(error).__name__] += 1
        if not isinstance(error, TYPED):
            report.problems.append(f"{wish}: {type(error).__name__}: {error}")
        return
    report.answered[kind] += 1
    if not _equal(found, expected):
        report.problems.append(f"{wish}: other numbers than with ample memory")


def _equal(found: _Answer, expected: _Answer) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = LOOP.run(run(build_family("llama", Path(folder)), options.calls, options.seed))
    print(f"### Out of memory, {options.calls} requests, seed {options.seed}\n")
    report.print()
    raise SystemExit(bool(report.problems) or report.leaked)


if __name__ == "__main__":
    main()
