"""What giving and fetching weights takes: seconds against bytes and link, and what it costs those who generate.

python -m benchmarks.weights [--model FOLDER] [--rate 125e6] [--tokens 64] [--rounds 3]

One peer serves all blocks and gives the model's files at `--rate` bytes per second (125e6: a link of 1 Gbit/s). A
mirror and a client start on machines of their own (fresh caches). Then a client decodes from the peer, in turn alone
and while others fetch as fast as it gives: these only take the bytes, at the lowest priority.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.core import fetch_model

_LOCAL = ("--host", "127.0.0.1", "--threads", "1")
_SINKS = 4


def _peer(cache: Path, *argv: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"HIVETUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peer", *argv]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _wait_ready(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("ready"):
        raise RuntimeError(process.communicate()[1])
    return line.split()[1].removeprefix("address=")


@contextlib.contextmanager
def _running(cache: Path, *argv: str) -> Iterator[str]:
    process = _peer(cache, *argv)
    try:
        yield _wait_ready(process)
    finally:
        process.kill()
        process.wait()


def _timed(cache: Path, *argv: str) -> float:
    """Seconds that a command takes to its end, or to its line that says it is ready."""
    begin = time.perf_counter()
    process = _peer(cache, *argv)
    if argv[0] == "generate":
        _, log = process.communicate()
        assert process.returncode == 0, log
    else:
        _wait_ready(process)
        process.kill()
        process.wait()
    return time.perf_counter() - begin


def _held(cache: Path) -> int:
    from protocol.weights.cache import Cache

    return sum(entry.held for entry in Cache(cache / "models").entries())


async def _sink(address: str) -> None:
    """Fetch pieces without end, and keep none."""
    from bootstrap.member import Member, MemberOptions
    from protocol import swarm_pb2 as pb
    from protocol.channel import Message
    from protocol.weights.fetch import Network, fetch_manifest

    os.nice(19)
    member = await Member.join(MemberOptions((address,), client_mode=True))
    network = Network(lambda: member, lambda: member.peer_id, member.directory.weights)
    giver = address.rpartition("/")[2]
    while not (given := [one.models[0] for one in await member.directory.weights() if one.peer_id == giver]):
        await asyncio.sleep(0.5)
    manifest = await fetch_manifest(network, given[0].manifest)

    async def draw() -> None:
        channel = await network.open(giver)
        for number in list(range(len(manifest.pieces))) * 1000:
            await channel.call(Message(pb.ReadPiece(manifest=bytes.fromhex(manifest.hash), number=number)))

    await asyncio.gather(*(draw() for _ in range(_SINKS)))


def _decode(model: Path, address: str, tokens: int, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens per second, alone and while others fetch, of each round."""
    import torch

    from client import AutoDistributedModelForCausalLM

    torch.set_num_threads(1)
    remote = AutoDistributedModelForCausalLM.from_pretrained(str(model), initial_peers=[address])
    ids = torch.arange(100, 116)[None]

    def speed() -> float:
        begin = time.perf_counter()
        remote.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return tokens / (time.perf_counter() - begin)

    speed()
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(speed())
        sink = subprocess.Popen([sys.executable, "-m", "benchmarks.weights", "--sink", address])
        time.sleep(8)  # it has joined, and fetches
        beside.append(speed())
        sink.kill()
        sink.wait()
        print(f"decode {alone[-1]:.1f} alone, {beside[-1]:.1f} beside", file=sys.stderr, flush=True)
    return alone, beside


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; default: SmolLM2-135M")
    parser.add_argument("--rate", type=float, default=125e6, help="bytes per second that the peer gives")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sink", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sink:
        asyncio.run(_sink(options.sink))
        return
    model = options.model or fetch_model("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder, name) for name in ("peer", "mirror", "client", "plain")}
        rate = ("--upload-rate", str(int(options.rate)))
        with _running(caches["peer"], "serve", str(model), *_LOCAL, *rate) as address:
            join = ("--initial-peers", address)
            prompt = ("A cat sat", "--max-new-tokens", "1", *join)
            plain = _timed(caches["plain"], "generate", str(model), *prompt)
            client = _timed(caches["client"], "generate", model.name, *prompt)
            mirror = _timed(caches["mirror"], "share", model.name, *_LOCAL[:2], *join)
            alone, beside = _decode(model, address, options.tokens, options.rounds)
        sizes = {name: _held(caches[name]) for name in ("client", "mirror")}
    print("| what | s | MB fetched | the link's limit, s |\n|---|---|---|---|")
    print(f"| client with the folder, to its first token | {plain:.1f} | 0 | 0 |")
    for name, seconds in (("client", client), ("mirror", mirror)):
        what = "client without, to its first token" if name == "client" else "`peer share NAME`, until all is there"
        print(f"| {what} | {seconds:.1f} | {sizes[name] / 1e6:,.1f} | {sizes[name] / options.rate:.1f} |")
    speeds = statistics.median(alone), statistics.median(beside)
    ratio = speeds[1] / speeds[0]
    print(f"\ndecode: {speeds[0]:.1f} tokens/s alone, {speeds[1]:.1f} while weights are given ({ratio:.2f})")


if __name__ == "__main__":
    main()
