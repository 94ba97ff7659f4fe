"""Training calls of several clients at once, run together and one by one, in seconds of CPU time:

python -m benchmarks.joined_calls --weights float32 --tokens 4 16 32 64 128 --rounds 9

Random llama, 4 blocks of hidden size 1,024; each client has a LoRA of its own (r=8 on q and v). The two ways take
turns, and the fastest of some rounds counts: whatever else runs on the machine only ever adds.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from peer.adapters.store import AdapterStore
from peer.span.loading import load_span
from peer.span.span import Inputs, Mode, Span
from peer.training.call import TrainingCall
from peer.training.joined.together import Together
from peer.training.runner import Task, TrainingRunner
from peer.training.trainer import Trainer
from protocol.model.checkpoint import open_checkpoint
from protocol.name import cache_folder
from tests.tools.families import build_llama
from tests.tools.lora import put_lora

_CACHE = cache_folder() / "benchmarks"
_HIDDEN, _BLOCKS = 1024, 4
_WEIGHTS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "nf4": (torch.float32, "nf4"),
}


class Bench:
    """Clients of one span of a llama. `clock`: seconds, of whatever is to be compared."""

    def __init__(self, span: Span, clients: int, clock: Callable[[], float] = time.process_time):
        store = AdapterStore(span, 10**9, 64, 10**9)
        self._span, self._runner = span, TrainingRunner(Trainer(span, store, 10**10, 10**11), Together(span, 10**6))
        targets = [f"{block}.self_attn.{name}_proj" for block in span.blocks for name in "qv"]
        self._bundles = [put_lora(store, span, targets, 8, seed, f"client {seed}") for seed in range(clients)]
        self._clock = clock

    def times(self, tokens: int, joined: bool) -> tuple[float, float]:
        """Seconds of all clients' forwards, and of these with their backwards."""
        runner, span, clock = self._runner, self._span, self._clock
        mode = Mode(span.blocks, training=True)
        hidden = torch.randn(1, tokens, span.hidden_size, dtype=span.dtype, device=span.device)
        begin = clock()
        calls = [TrainingCall(Inputs(hidden), mode, bundle, {}) for bundle in self._bundles]
        answers = self._run([runner.forward(call, "client", keep=True) for call in calls], joined)
        middle = clock()
        self._run([runner.backward_kept(call_id, "client", hidden) for _, call_id in answers], joined)
        return middle - begin, clock() - begin

    def _run(self, tasks: Sequence[Task], joined: bool) -> list[Any]:
        return self._runner.run(tasks) if joined else [self._runner.run([task])[0] for task in tasks]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 32, 64, 128], help="of each call")
    parser.add_argument("--weights", choices=list(_WEIGHTS), nargs="+", default=["float32"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {"hidden": _HIDDEN, "layers": _BLOCKS, "heads": 16, "intermediate": 2816, "vocab": 1000}
    checkpoint = open_checkpoint(str(build_llama(_CACHE, name="llama-1024x4", **sizes)))
    print("| weights | tokens of a call | forward, ms: one by one, joined | with backward: one by one, joined |")
    print("|---|---|---|---|")
    for weights in options.weights:
        dtype, quantization = _WEIGHTS[weights]
        bench = Bench(load_span(checkpoint, 0, _BLOCKS, dtype=dtype, quantization=quantization), options.clients)
        for tokens in options.tokens:
            rounds = [bench.times(tokens, joined) for _ in range(options.rounds) for joined in (False, True)]
            alone, joined = ([1000 * min(times) for times in zip(*rounds[i::2], strict=True)] for i in (0, 1))
            cells = (f"{a:.0f}, {j:.0f} ({a / j:.2f} times)" for a, j in zip(alone, joined, strict=True))
            print(f"| {weights} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
