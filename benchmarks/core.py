"""One stream through a swarm on loopback, against plain local Transformers in turn: decode, first token; start, memory.

python -m benchmarks.core --model llama --peers 2 --threads 2     (random llama, hidden 1024, 16 blocks, float32)

Also: llama-bf16, bloom (random, hidden 1024, 24 blocks, float32), smollm2 (SmolLM2-135M-Instruct, float32).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
import transformers

from client import AutoDistributedModelForCausalLM
from peer.commands.sample_model import fetch_sample_model
from protocol.name import cache_folder
from tests.tools.families import build_bloom, build_llama

_CACHE = cache_folder() / "benchmarks"
_ROUNDS = 5
_PROMPT, _TOKENS = 32, 40


MODELS = ("llama", "llama-bf16", "bloom", "smollm2")


def fetch_model(name: str) -> Path:
    """The folder of one of `MODELS`, made or downloaded unless it is there."""
    if name == "smollm2":
        return fetch_sample_model()
    if name == "bloom":
        return build_bloom(_CACHE, name="bloom-1024x24", hidden=1024, layers=24, heads=16, vocab=32000)
    dtype, suffix = (torch.bfloat16, "-bf16") if name == "llama-bf16" else (torch.float32, "")
    sizes = {"hidden": 1024, "layers": 16, "heads": 16, "intermediate": 2816, "vocab": 32000}
    return build_llama(_CACHE, name=f"llama-1024x16{suffix}", dtype=dtype, **sizes)


@dataclass
class Started:
    """A peer process and how long it took to get ready."""

    process: subprocess.Popen[str]
    address: str
    seconds: float

    def memory(self) -> int:
        """Resident bytes."""
        return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def running_swarm(model: Path, peers: int, threads: int, *options: str) -> Iterator[list[Started]]:
    """`peers` processes of `peer serve` over even spans, with `options`. Raises `RuntimeError` if one cannot start."""
    total = transformers.AutoConfig.from_pretrained(model).num_hidden_layers
    started: list[Started] = []
    with tempfile.TemporaryFile("w+") as log:
        try:
            for i in range(peers):
                span = f"{total * i // peers}:{total * (i + 1) // peers}"
                join = ["--initial-peers", started[0].address] if started else []
                command = [sys.executable, "-m", "peer", "serve", str(model), "--blocks", span]
                begin = time.perf_counter()
                process = subprocess.Popen(
                    [*command, "--host", "127.0.0.1", "--threads", str(threads), *options, *join],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                started.append(Started(process, "", 0.0))
                assert process.stdout
                line = process.stdout.readline()
                if "address=" not in line:
                    log.seek(0)
                    raise RuntimeError(f"a peer of blocks {span} did not start: {log.read()[-2000:]}")
                started[-1].address = line.split("address=")[1].split()[0]
                started[-1].seconds = time.perf_counter() - begin
            yield started
        finally:
            for peer in started:
                peer.process.terminate()
            for peer in started:
                peer.process.wait(10)


def with_lora(model: Any) -> Any:
    """LoRA r=8 on q and v, as in the tables of the field."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def prompt(vocabulary: int, tokens: int) -> torch.Tensor:
    """(1, tokens)."""
    return torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def wait_for(device: torch.device) -> None:
    """Until what was handed to a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(model: Any, ids: torch.Tensor, count: int) -> float:
    """Seconds of `count` greedy tokens."""
    ids = ids.to(model.device)
    wait_for(model.device)
    begin = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            min_new_tokens=count, max_new_tokens=count,
        )  # fmt: skip
    wait_for(model.device)
    return time.perf_counter() - begin


def decode_step(model: Any, vocabulary: int) -> float:
    """Seconds of a decode step."""
    ids = prompt(vocabulary, _PROMPT)
    return (generate(model, ids, _TOKENS + 1) - generate(model, ids, 1)) / _TOKENS


def measure(
    models: Sequence[Any], vocabulary: int, prompts: Sequence[int], rounds: int = _ROUNDS
) -> dict[str, list[float]]:
    """Each figure, seconds, of each of `models`: the median of some rounds in which they take turns, after one that
    does not count. `prompts`: lengths, of each of which the first token is waited for."""
    figures: dict[str, Callable[[Any], float]] = {"decode step": lambda model: decode_step(model, vocabulary)}
    for tokens in prompts:
        ids = prompt(vocabulary, tokens)
        figures[f"first token of {tokens}"] = lambda model, ids=ids: generate(model, ids, 1)  # type: ignore[misc]
    found = {}
    for name, take in figures.items():
        taken = [[take(model) for model in models] for _ in range(rounds + 1)][1:]
        found[name] = [statistics.median(times) for times in zip(*taken, strict=True)]
    return found


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--peer-threads", type=int, help="of each peer, if other than --threads")
    parser.add_argument("--prompts", type=int, nargs="*", default=(512, 2048), help="tokens")
    parser.add_argument("--compile", action="store_true", help="have the peers compile their steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peer_threads = options.peer_threads or options.threads
    transformers.utils.logging.disable_progress_bar()
    path = fetch_model(options.model)
    vocabulary = transformers.AutoConfig.from_pretrained(path).vocab_size
    with running_swarm(path, options.peers, peer_threads, *["--compile"] * options.compile) as peers:
        before = psutil.Process().memory_info().rss
        begin = time.perf_counter()
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(path), initial_peers=[peers[0].address])
        start = time.perf_counter() - begin
        grown = psutil.Process().memory_info().rss - before
        local = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        found = measure([remote, local], vocabulary, options.prompts)
        memory = [peer.memory() for peer in peers]
    compiled = ", compiled" if options.compile else ""
    print(f"### {options.model}, {options.peers} peers, {peer_threads} of {options.threads} threads each{compiled}\n")
    print("| figure | swarm, ms | local, ms | local / swarm |\n|---|---|---|---|")
    for name, (ours, theirs) in found.items():
        print(f"| {name} | {1000 * ours:.1f} | {1000 * theirs:.1f} | {theirs / ours:.2f} |")
    starts = ", ".join(f"{peer.seconds:.1f} s" for peer in peers)
    print(f"\nPeer start: {starts} (imports included). Client start: {start:.1f} s (imports done).")
    resident = ", ".join(f"{m / 2**20:.0f} MiB" for m in memory)
    print(f"RSS: peers {resident}; client grew by {grown / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
