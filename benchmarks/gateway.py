"""HTTP clients of one `peer gateway` against one local `generate` of as many rows, in turn, on the same cores:

python -m benchmarks.gateway --model llama --peers 1      (random llama, hidden 1024, 16 blocks, float32)

Then a crowd of clients; the first token of each turn of a conversation; what the gateway itself takes, by its own
count, and by a request that makes no token. Clients read raw HTTP: what OpenAI's package takes is not the gateway's.
"""

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.core import MODELS, fetch_model, running_swarm
from benchmarks.many import Bench, Run, compared, in_turn, rate
from tests.tools.words import save_tokenizer

_CONTEXT, _CLIENTS, _CROWD = 128, 8, 32
_TURNS, _ANSWER = 10, 16
_MODEL = "model"


class Door:
    """A running gateway."""

    def __init__(self, url: str, vocabulary: int):
        self._host, self._vocabulary = url.removeprefix("http://"), vocabulary
        self._chance = random.Random(0)

    def prompt(self, tokens: int) -> list[int]:
        """One that nobody has sent before."""
        return [self._chance.randrange(3, self._vocabulary) for _ in range(tokens)]

    def stream(self, prompt: Sequence[int], tokens: int) -> tuple[Run, str]:
        """A text of so many tokens: when each came, and the text."""
        asked = {"model": _MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        connection = http.client.HTTPConnection(self._host, timeout=600)
        began = last = time.monotonic()
        times, text = list[float](), ""
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(asked | {"stream": True, "logprobs": 0}), headers)
            for line in connection.getresponse():
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    return Run(times, began, piece["error"]["message"]), text
                (choice,) = piece["choices"]
                text += choice["text"]
                if choice["logprobs"]:
                    now = time.monotonic()
                    times.append(now - last)
                    last = now
        except OSError as error:
            return Run(times, began, f"{type(error).__name__}: {error}"), text
        finally:
            connection.close()
        return Run(times, began, "" if len(times) == tokens else f"{len(times)} tokens came"), text

    def at_once(self, clients: int, context: int, tokens: int) -> list[Run]:
        """What so many clients were given."""
        prompts = [self.prompt(context) for _ in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            runs = list(pool.map(lambda prompt: self.stream(prompt, tokens + 1)[0], prompts))
        for error in sorted({run.error for run in runs if run.error}):
            print(f"\nERROR: {error}\n")
        return [run for run in runs if not run.error]

    def metrics(self) -> dict[str, float]:
        """The gateway's own counts."""
        connection = http.client.HTTPConnection(self._host)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {
            name: float(value) for name, value in (line.split() for line in lines if line[0] != "#" and "{" not in line)
        }

    def ask(self, path: str, content: dict[str, Any]) -> float:
        """Seconds of a request."""
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(self._host)
        connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        connection.getresponse().read()
        connection.close()
        return time.perf_counter() - begin


@contextmanager
def open_door(path: Path, address: str, threads: int, *options: str) -> Iterator[Door]:
    """A gateway to the swarm."""
    vocabulary = transformers.AutoConfig.from_pretrained(path).vocab_size
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, path.name)
        model.mkdir()
        for file in path.iterdir():
            (model / file.name).symlink_to(file)
        if not (path / "tokenizer.json").exists():
            save_tokenizer(model, vocabulary)
        command = [sys.executable, "-m", "peer", "gateway", str(model), "--name", _MODEL, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--initial-peers", address, "--threads", str(threads), *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout
            yield Door(process.stdout.readline().split("url=")[1].split()[0], vocabulary)
        finally:
            process.terminate()
            process.wait(10)


def compare(door: Door, bench: Bench, clients: int, context: int, tokens: int) -> None:
    """Clients at once against a local batch, and what the gateway counts of itself meanwhile."""
    before = door.metrics()
    rates = in_turn(
        {
            "gateway": lambda: rate(door.at_once(clients, context, tokens)),
            "local": partial(bench.local_rate, clients, context=context, whole=True),
        }
    )
    grown = {name: value - before.get(name, 0.0) for name, value in door.metrics().items()}
    figures = " | ".join(f"{statistics.median(taken):.1f}" for taken in rates.values())
    print(f"| {clients} clients, context {context} | gateway tok/s | local batch tok/s | ratio (rounds) |")
    print(f"|---|---|---|---|\n| greedy | {figures} | {compared(*rates.values())} |\n")
    own, rounds, made = (grown[f"hivetune_{name}"] for name in ("own_seconds", "rounds", "generated_tokens_total"))
    print(f"The gateway's own: {1e3 * own / made:.2f} ms a token, ", end="")
    print(f"{1e3 * own / rounds:.2f} ms a round of {made / rounds:.1f}.")


def crowd(door: Door, clients: int, context: int, tokens: int) -> None:
    """Errors and latency of many."""
    runs = door.at_once(clients, context, tokens)
    steps = sorted(step for run in runs for step in run.steps[1:])
    firsts = sorted(run.steps[0] for run in runs)
    print(f"\n{clients} clients, context {context}: {clients - len(runs)} errors; {rate(runs):.1f} tok/s; first token")
    print(
        f"{statistics.median(firsts):.2f} s (last {firsts[-1]:.2f}); a token {statistics.median(steps):.3f} s, ", end=""
    )
    print(f"p95 {steps[int(0.95 * len(steps))]:.3f} s.")


def converse(door: Door, tokens: int) -> None:
    """The first token of each turn, and of a conversation as long that is new."""
    history, firsts = list[int](), list[float]()
    each = tokens // _TURNS - _ANSWER
    for _ in range(_TURNS):
        history += door.prompt(each)
        run, _text = door.stream(history, _ANSWER)
        firsts.append(run.steps[0])
        history += door.prompt(_ANSWER)  # not what was answered: a template writes that in its own way
    new = statistics.median(door.stream(door.prompt(len(history) - _ANSWER), 1)[0].steps[0] for _ in range(3))
    print(f"\nA conversation of {_TURNS} turns, {len(history)} tokens: first token ", end="")
    print(f"of turn 1 after {firsts[0]:.2f} s, ", end="")
    print(f"of turn {_TURNS} after {firsts[-1]:.2f} s ({firsts[-1] / firsts[0]:.2f}); ", end="")
    print(f"of a new one as long after {new:.2f} s.")


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--path", type=Path, help="a model's folder, instead of --model")
    parser.add_argument("--peers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--tokens", type=int, default=32, help="that each client is given")
    parser.add_argument("--clients", type=int, default=_CLIENTS)
    parser.add_argument("--crowd", type=int, default=_CROWD)
    parser.add_argument("--context", type=int, default=_CONTEXT)
    parser.add_argument("--conversation", type=int, default=2000, help="tokens of it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = options.path or fetch_model(options.model)
    with (
        running_swarm(path, options.peers, options.threads) as peers,
        open_door(path, peers[0].address, options.threads) as door,
    ):
        print(f"### HTTP clients: {path.name}, {options.peers} peers, {options.threads} threads each\n")
        compare(door, Bench(path, [peers[0].address], options.tokens), options.clients, options.context, options.tokens)
        crowd(door, options.crowd, options.context, options.tokens)
        converse(door, options.conversation)
        request = {"model": _MODEL, "prompt": door.prompt(options.context)}
        empty = statistics.median(door.ask("/tokenize", request | {"prompt": "w5"}) for _ in range(50))
        print(f"\nA request that makes no token takes {1e3 * empty:.2f} ms.")


if __name__ == "__main__":
    main()
