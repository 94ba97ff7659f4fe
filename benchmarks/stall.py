"""What a peer's end costs a generation that goes through it:

python -m benchmarks.stall --model llama    (random llama, hidden 256, 8 blocks)
python -m benchmarks.stall --model smollm2  (SmolLM2-135M-Instruct)

Two peers hold all blocks. In mid-decode the one in use is killed with -9, or stopped. Measured are the time until the
client knows, and the pause between two tokens beyond a usual step; the replay, a prefill of the whole context on the
other peer, is part of it and is also measured alone. Everything is done `--count` times, after one that is not counted.
"""

import argparse
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.core import MODELS
from client import AutoDistributedModelForCausalLM
from client.swarm.retries import Retries
from peer.commands.sample_model import fetch_sample_model
from tests.tools.families import build_llama
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm

_TOKENS, _AT = 12, 6


@dataclass(frozen=True)
class Stall:
    """Seconds."""

    detection: float
    pause: float
    replay: float


class _Ender(LogitsProcessor):
    """Ends a peer at a token, and notes when tokens came."""

    def __init__(self, end: Callable[[], None]):
        self._end = end
        self.times: list[float] = []
        self.ended_at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.monotonic())
        if len(self.times) == _AT:
            self._end()
            self.ended_at = self.times[-1] = time.monotonic()
        return scores


class Arena:
    """Two peers with all blocks of a model, of which one ends in every run."""

    def __init__(self, swarm: Swarm, path: Path, blocks: int):
        self._swarm, self._path, self._span = swarm, path, f"0:{blocks}"
        swarm.launch("bootstrap", "--host", "127.0.0.1").wait_ready()
        self._peers = swarm.serve(path, self._span, self._span)

    def measure(self, context: int, how: int, silence: float) -> Stall:
        """One generation with `context` tokens of prompt, in which the peer in use gets the signal `how`."""
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            str(self._path), initial_peers=self._swarm.initial_peers, silence_timeout=silence
        )
        (hop,) = model.swarm.route()
        victim, heir = sorted(self._peers, key=lambda peer: peer.peer_id != hop.peer.peer_id)
        model.swarm.health.measured(heir.peer_id, 9.0)  # far away, as far as anyone knows: it is turned to last
        replay = self._prefill(model, victim, context)
        ender, known_at = _Ender(lambda: victim.send(how)), _when_known()
        self._generate(model, context, ender)
        self._replace(victim, heir)
        steps = [later - earlier for earlier, later in zip(ender.times[1:], ender.times[2:], strict=False)]
        pause = ender.times[_AT] - ender.ended_at
        return Stall(known_at[0] - ender.ended_at, pause - statistics.median(steps), replay)

    def _prefill(self, model: Any, peer: Peer, context: int) -> float:
        """What the whole context takes anew, on a peer that the client is connected to."""
        self._generate(model, 8, None)
        begin = time.monotonic()
        with torch.no_grad():
            model(input_ids=_prompt(model, context + _AT), use_cache=True)
        return time.monotonic() - begin

    def _generate(self, model: Any, context: int, ender: LogitsProcessor | None) -> None:
        ids = _prompt(model, context)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, do_sample=False,
            eos_token_id=None, logits_processor=LogitsProcessorList([ender] if ender else []),
        )  # fmt: skip

    def _replace(self, victim: Peer, heir: Peer) -> None:
        if victim.is_alive():  # stopped
            victim.kill()
        self._peers = [heir, *self._swarm.serve(self._path, self._span)]


def _prompt(model: Any, tokens: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


def _when_known() -> list[float]:
    """Filled with the times at which the client took note of failures."""
    times, failed = list[float](), Retries.failed

    def note(self: Retries, *arguments: Any) -> None:
        times.append(time.monotonic())
        Retries.failed = failed  # type: ignore[method-assign]
        failed(self, *arguments)

    Retries.failed = note  # type: ignore[method-assign]
    return times


def _model(name: str, root: Path) -> Path:
    if name == "smollm2":
        return fetch_sample_model()
    return build_llama(root, name="llama-256x8", hidden=256, layers=8, heads=8, intermediate=704, vocab=8000)


def print_row(title: str, stalls: list[Stall]) -> None:
    """Median and worst of the three figures."""
    figures = []
    for name in ("detection", "pause", "replay"):
        values = [getattr(stall, name) for stall in stalls]
        figures.append(f"{statistics.median(values):.3f} / {max(values):.3f}")
    print(f"| {title} | {len(stalls)} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--count", type=int, default=20, help="kills; peers are stopped a fifth as often")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cases = [("killed, context 100", 100, signal.SIGKILL, 10.0), ("killed, context 1000", 1000, signal.SIGKILL, 10.0)]
    stops = [("stopped, silence_timeout 10 (default)", 100, signal.SIGSTOP, 10.0)]
    stops.append(("stopped, silence_timeout 2", 100, signal.SIGSTOP, 2.0))
    with tempfile.TemporaryDirectory() as folder:
        path, server = _model(options.model, Path(folder)), ForkServer()
        blocks = transformers.AutoConfig.from_pretrained(path).num_hidden_layers
        print(f"### Stall, {options.model}: median / worst, seconds\n")
        print("| what | times | until known | pause beyond a step | replay alone |\n|---|---|---|---|---|")
        with new_swarm(server) as swarm:
            arena = Arena(swarm, path, blocks)
            arena.measure(*cases[0][1:])
            for title, *case in [*cases, *stops]:
                count = options.count if case[1] == signal.SIGKILL else max(options.count // 5, 1)
                print_row(title, [arena.measure(*case) for _ in range(count)])
        server.close()


if __name__ == "__main__":
    main()
