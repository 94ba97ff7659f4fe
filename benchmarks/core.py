"""Start-up, memory, decode and LoRA step of a swarm on loopback, against plain local Transformers + PEFT, in one run:

python -m benchmarks.core --model llama --peers 2 --threads 2     (random llama, hidden 1024, 16 blocks, float32)
python -m benchmarks.core --model smollm2 --peers 2 --threads 2   (SmolLM2-135M-Instruct, float32)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import psutil
import torch
import transformers

from client import AutoDistributedModelForCausalLM
from peer.sample_model import fetch_sample_model
from tests.families import build_llama

_CACHE = Path.home() / ".cache" / "swarmtune" / "benchmarks"
_BATCHES = ((8, 128), (4, 512))


MODELS = ("llama", "smollm2")


def fetch_model(name: str) -> Path:
    """The folder of one of `MODELS`, made or downloaded unless it is there."""
    if name == "smollm2":
        return fetch_sample_model()
    sizes = {"hidden": 1024, "layers": 16, "heads": 16, "intermediate": 2816, "vocab": 32000}
    return build_llama(_CACHE, name="llama-1024x16", **sizes)


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
def running_swarm(model: Path, peers: int, threads: int) -> Iterator[list[Started]]:
    """`peers` processes of `peer serve` over even spans."""
    total = transformers.AutoConfig.from_pretrained(model).num_hidden_layers
    started: list[Started] = []
    with tempfile.TemporaryFile("w") as log:
        try:
            for i in range(peers):
                span = f"{total * i // peers}:{total * (i + 1) // peers}"
                join = ["--initial-peers", started[0].address] if started else []
                command = [sys.executable, "-m", "peer.cli", "serve", str(model), "--blocks", span]
                begin = time.perf_counter()
                process = subprocess.Popen(
                    [*command, "--host", "127.0.0.1", "--threads", str(threads), *join],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                assert process.stdout
                line = process.stdout.readline()
                address = line.split("address=")[1].split()[0]
                started.append(Started(process, address, time.perf_counter() - begin))
            yield started
        finally:
            for peer in started:
                peer.process.terminate()
            for peer in started:
                peer.process.wait(10)


def decode_rate(model: Any, vocabulary: int, prompt: int = 32, tokens: int = 40) -> tuple[float, float]:
    """Tokens per second of greedy decode, and seconds to the first token of a prompt of 512."""
    ids = torch.randint(3, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    long = torch.randint(3, vocabulary, (1, 512), generator=torch.Generator().manual_seed(1))

    def run(inputs: torch.Tensor, count: int) -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False,
                min_new_tokens=count, max_new_tokens=count,
            )  # fmt: skip
        return time.perf_counter() - begin

    run(ids, 4)
    rates = [tokens / (run(ids, tokens + 1) - run(ids, 1)) for _ in range(3)]
    return statistics.median(rates), statistics.median(run(long, 1) for _ in range(3))


def train_rate(model: Any, vocabulary: int, batch: int, length: int) -> float:
    """Tokens per second of whole LoRA steps: forward, backward, optimizer."""
    ids = torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    times = [_timed(step) for _ in range(2)]
    model.eval()
    return batch * length / statistics.median(times)


def _timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def with_lora(model: Any) -> Any:
    """LoRA r=8 on q and v, as in the tables of the field."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def measure(model: Any, vocabulary: int) -> dict[str, float]:
    """Every figure that is compared."""
    rate, first = decode_rate(model, vocabulary)
    figures = {"decode tok/s": rate, "first token of 512, s": first}
    tuned = with_lora(model)
    for batch, length in _BATCHES:
        figures[f"LoRA step {batch}x{length} tok/s"] = train_rate(tuned, vocabulary, batch, length)
    return figures


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = fetch_model(options.model)
    vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
    with running_swarm(model, options.peers, options.threads) as peers:
        before = psutil.Process().memory_info().rss
        begin = time.perf_counter()
        remote = AutoDistributedModelForCausalLM.from_pretrained(str(model), initial_peers=[peers[0].address])
        start = time.perf_counter() - begin
        client_memory = psutil.Process().memory_info().rss - before
        swarm = measure(remote, vocabulary)
        memory = [peer.memory() for peer in peers]
        starts = [peer.seconds for peer in peers]
    local = measure(transformers.AutoModelForCausalLM.from_pretrained(model).eval(), vocabulary)
    print(f"### {options.model}, {options.peers} peers, {options.threads} threads each\n")
    print("| figure | swarm | local | ratio |\n|---|---|---|---|")
    for name, ours in swarm.items():
        ratio = local[name] / ours if name.endswith(", s") else ours / local[name]
        print(f"| {name} | {ours:.2f} | {local[name]:.2f} | {ratio:.2f} |")
    print(f"\nPeer start: {', '.join(f'{s:.1f} s' for s in starts)} (imports included). Client start: {start:.1f} s.")
    resident = ", ".join(f"{m / 2**20:.0f} MiB" for m in memory)
    print(f"RSS: peers {resident}; client grew by {client_memory / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
