"""What a LoRA step through a swarm costs: time, bytes on the wire, memory; against plain local Transformers + PEFT:

python -m benchmarks.training --model llama --peers 3 --threads 2     (random llama, hidden 1024, 16 blocks, float32)
python -m benchmarks.training --model smollm2 --peers 1 --threads 2   (SmolLM2-135M-Instruct, float32)

The least number of bytes is: for each span the hidden states once in each direction in forward, their gradients once in
each direction in backward; and once a step each adapter tensor there and its gradient back.
"""

import argparse
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.core import MODELS, fetch_model, running_swarm, wait_for, with_lora
from benchmarks.traffic import counting
from client import AutoDistributedModelForCausalLM

_MIB = 2**20


@dataclass(frozen=True)
class Step:
    """Medians over steps. `least`: bytes that a step cannot do without, each way."""

    tokens_per_second: float
    sent: float
    received: float
    least: int


def measure_steps(model: Any, spans: int, batch: int, length: int, count: int) -> Step:
    """Whole steps (forward, backward, AdamW) on `batch` rows of `length` tokens, after one that is not counted."""
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds, sent, received = list[float](), list[int](), list[int]()
    model.train()
    for _ in range(count + 1):
        with counting() as traffic:
            begin = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait_for(model.device)
            seconds.append(time.perf_counter() - begin)
        sent.append(traffic.sent)
        received.append(traffic.received)
    hidden = ids.numel() * model.config.hidden_size * model.dtype.itemsize
    adapters = sum(parameter.nbytes for parameter in parameters)
    medians = [statistics.median(figures[1:]) for figures in (seconds, sent, received)]
    return Step(ids.numel() / medians[0], medians[1], medians[2], 2 * spans * hidden + adapters)


def forget_peak() -> None:
    """From here on `peak` counts anew for this process."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(process: int | str = "self") -> int:
    """The most bytes that a process had resident (VmHWM)."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.M)
    assert match
    return int(match[1]) * 1024


def parse_batch(text: str) -> tuple[int, int]:
    """`8x128` as rows and tokens per row."""
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def print_table(title: str, steps: list[tuple[tuple[int, int], Step, Step]]) -> None:
    """A Markdown table, one line a batch."""
    print(f"### {title}\n")
    print("| LoRA step | swarm tok/s | local tok/s | ratio | MiB sent | MiB received | least, each way |")
    print("|---|---|---|---|---|---|---|")
    for (rows, tokens), ours, theirs in steps:
        ratio = ours.tokens_per_second / theirs.tokens_per_second
        speeds = f"{ours.tokens_per_second:.1f} | {theirs.tokens_per_second:.1f} | {ratio:.2f}"
        sizes = " | ".join(f"{size / _MIB:.2f}" for size in (ours.sent, ours.received, ours.least))
        print(f"| {rows}x{tokens} | {speeds} | {sizes} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--peer-threads", type=int, help="of each peer, if other than --threads")
    parser.add_argument("--batches", type=parse_batch, nargs="+", default=[(8, 128), (4, 512)], metavar="ROWSxTOKENS")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peer_threads = options.peer_threads or options.threads
    transformers.utils.logging.disable_progress_bar()
    model = fetch_model(options.model)

    def measure(loaded: Any) -> list[Step]:
        tuned = with_lora(loaded)
        return [measure_steps(tuned, options.peers, *batch, options.steps) for batch in options.batches]

    forget_peak()
    with running_swarm(model, options.peers, peer_threads) as peers:
        ours = measure(AutoDistributedModelForCausalLM.from_pretrained(str(model), initial_peers=[peers[0].address]))
        client_peak, peaks = peak(), [peak(peer.process.pid) for peer in peers]
    forget_peak()
    theirs = measure(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    title = (
        f"{options.model}, LoRA r=8 on q and v, {options.peers} peers, {peer_threads} of {options.threads} threads each"
    )
    print_table(title, list(zip(options.batches, ours, theirs, strict=True)))
    spread = ", ".join(f"{size / _MIB:.0f}" for size in peaks)
    print(f"\nPeak memory, MiB: client {client_peak / _MIB:.0f}, peers {spread}; local {peak() / _MIB:.0f}.")


if __name__ == "__main__":
    main()
