"""Four spans behind slow links: what a decode step, a training step and speculation take, with and without hand-over.

python -m benchmarks.latency --delay 50           (milliseconds one way; every link between two processes has them)

Each peer is reached through a proxy that holds back what it passes on, both ways.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.traffic import counting
from peer.commands.sample_model import fetch_sample_model
from tests.tools.delay import delayed, free_ports
from tests.tools.families import build_llama
from tests.tools.swarm import ForkServer, Swarm, new_swarm

_WARM_UP = 4
_BATCH, _LENGTH = 4, 128
_NEVER = 1e9


class _Clock(LogitsProcessor):
    """When tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.monotonic())
        return scores

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return statistics.median(
            later - earlier for earlier, later in zip(self.times[_WARM_UP:], self.times[_WARM_UP + 1 :], strict=False)
        )


@contextmanager
def far_swarm(server: ForkServer, path: Path, spans: int, delay: float) -> Iterator[Swarm]:
    """Even spans of a model on peers with slow links."""
    blocks = transformers.AutoConfig.from_pretrained(path).num_hidden_layers
    ports = free_ports(4 * spans)
    ways, targets = ports[: 2 * spans], ports[2 * spans :]
    with delayed(delay, dict(zip(ways, targets, strict=True))), new_swarm(server) as swarm:
        for index in range(spans):
            span = f"{blocks * index // spans}:{blocks * (index + 1) // spans}"
            one, other = (f"/ip4/127.0.0.1/tcp/{way}" for way in ways[2 * index : 2 * index + 2])
            port, direct_port = map(str, targets[2 * index : 2 * index + 2])
            announced = ("--announce", one, "--announce-direct", other)
            swarm.serve(path, span, options=("--port", port, "--direct-port", direct_port, *announced))
        yield swarm


@dataclass
class Measured:
    """One way of going through a swarm."""

    decode: float
    """Seconds per step."""
    train: float
    """Seconds of a LoRA step."""
    sent: int
    received: int
    """Bytes of that step, on the client's link."""


def measure(model: Any, tokens: int) -> Measured:
    """Decode steps and a LoRA step of `model`."""
    clock = _Clock()
    generate(model, prompt(model, 16), tokens, logits_processor=LogitsProcessorList([clock]))
    torch.manual_seed(0)
    tuned: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    ids = prompt(model, _LENGTH).expand(_BATCH, -1)
    train(tuned, ids)
    begin = time.monotonic()
    with counting() as traffic:
        train(tuned, ids)
    return Measured(clock.step, time.monotonic() - begin, traffic.sent, traffic.received)


def train(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward of one batch."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def prompt(model: Any, tokens: int) -> torch.Tensor:
    """(1, tokens)."""
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


def generate(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    """Greedy."""
    said: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, **options,
    )  # fmt: skip
    return said


def print_hand_over(server: ForkServer, spans: int, delay: float, tokens: int) -> None:
    """The first table: with and without, against no links at all."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_llama(
            Path(folder), name="llama-256x8", hidden=256, layers=8, heads=8, intermediate=704, vocab=8000
        )
        torch.set_num_threads(1)
        compute = measure(transformers.AutoModelForCausalLM.from_pretrained(path), tokens)
        with far_swarm(server, path, spans, delay) as swarm:
            found = {
                name: measure(swarm.connect(path, hand_over_above=above, micro_batch_tokens=_LENGTH), tokens)
                for name, above in (("hand-over", 0.005), ("through the client", _NEVER))
            }
    bound = (spans + 1) * delay + compute.decode
    print(f"### {spans} spans, links of {1000 * delay:g} ms one way, llama-256x8\n")
    print("| way | decode step, ms | of the bound | LoRA step 4x128, s | sent, KB | received, KB |")
    print("|---|---|---|---|---|---|")
    print(f"| local | {1000 * compute.decode:.1f} | | {compute.train:.2f} | | |")
    for name, one in found.items():
        kilobytes = f"{one.sent / 1000:.0f} | {one.received / 1000:.0f}"
        print(f"| {name} | {1000 * one.decode:.1f} | {one.decode / bound:.2f} | {one.train:.2f} | {kilobytes} |")
    print(f"\nBound: ({spans} + 1) x {1000 * delay:g} ms + local step = {1000 * bound:.1f} ms.\n", flush=True)


def print_speculation(server: ForkServer, spans: int, delay: float, tokens: int) -> None:
    """The second table: tokens/s of SmolLM2 by prompt lookup on a copy task, and with itself as the draft."""
    path = fetch_sample_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    draft = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    text = "Repeat this list three times: red apple, green pear, yellow lemon, blue plum, white grape.\nred apple,"
    copy = tokenizer(text, return_tensors="pt").input_ids
    story = tokenizer("Once upon a time, in a small village by the sea,", return_tensors="pt").input_ids
    ways: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "copy task, plain": (copy, {}),
        "copy task, prompt lookup": (copy, {"prompt_lookup_num_tokens": 8}),
        "story, plain": (story, {}),
        "story, assisted by itself": (story, {"assistant_model": draft}),
    }
    with far_swarm(server, path, spans, delay) as swarm:
        model = swarm.connect(path)
        print(f"### Speculation, SmolLM2-135M over {spans} spans, links of {1000 * delay:g} ms one way\n")
        print("| way | tokens/s | as plain |\n|---|---|---|")
        said: dict[str, torch.Tensor] = {}
        speeds: dict[str, float] = {}
        for name, (ids, options) in ways.items():
            seconds, said[name] = timed(lambda ids=ids, options=options: generate(model, ids, tokens, **options))
            task = name.partition(",")[0]
            speeds[name] = tokens / seconds
            same = bool(torch.equal(said[name], said[f"{task}, plain"]))
            gain = speeds[name] / speeds[f"{task}, plain"]
            print(
                f"| {name} | {speeds[name]:.2f} | {gain:.2f}x, {'the same tokens' if same else 'other tokens'} |",
                flush=True,
            )


def timed(do: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds of the second of two runs, and its result."""
    do()
    begin = time.monotonic()
    result = do()
    return time.monotonic() - begin, result


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds one way")
    parser.add_argument("--spans", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    server = ForkServer()
    print_hand_over(server, options.spans, options.delay / 1000, options.tokens)
    print_speculation(server, options.spans, options.delay / 1000, options.tokens)
    server.close()


if __name__ == "__main__":
    main()
