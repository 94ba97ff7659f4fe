"""HTTP clients that come and go at a gateway for a long time: do its memory, descriptors and threads stay as they are?

python -m benchmarks.gateway_soak --minutes 60

The load comes in rounds: texts, streams that are read to the end or not, chats, log-probabilities, several choices,
adapters, refused requests. Every greedy text must be the one that was given first for its prompt. After each round the
gateway comes to rest and is measured; the rounds after the first are compared, the mean of the first third with the
last.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import transformers

from benchmarks.soak import figures_of, growth
from tests.tools.arena import with_adapter
from tests.tools.families import build_family
from tests.tools.gateway import RunningGateway, new_gateway
from tests.tools.swarm import ForkServer, new_swarm
from tests.tools.words import save_tokenizer

_PROMPTS = 40
_TEMPLATE = "{% for message in messages %}w9 {{ message.content }} {% endfor %}w10"


class GatewaySoak:
    """Clients of one gateway, and what they saw."""

    def __init__(self, gateway: RunningGateway, clients: int):
        self._gateway, self._clients = gateway, clients
        self._first: dict[tuple[str, tuple[int, ...]], str] = {}
        self.done, self.problems = Counter[str](), list[str]()

    def round(self, seconds: float, seed: int) -> None:
        """All clients at once, for so long."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(self._clients) as pool:
            list(
                pool.map(lambda number: self._client(random.Random(1000 * seed + number), until), range(self._clients))
            )

    def _client(self, chance: random.Random, until: float) -> None:
        kinds = [self._text, self._stream, self._leave, self._chat, self._logprobs, self._choices, self._refused]
        while time.monotonic() < until:
            with self._gateway.client() as client:  # a connection of its own
                for _ in range(chance.randint(1, 4)):
                    kind = chance.choice(kinds)
                    try:
                        kind(client, chance)
                    except openai.OpenAIError as error:
                        self.problems.append(f"{kind.__name__}: {error}")
                    self.done[kind.__name__.strip("_")] += 1

    def _asked(self, chance: random.Random) -> dict[str, Any]:
        number = chance.randrange(_PROMPTS)
        prompt = [5 + (number * 7 + i * (1 + number % 5)) % 120 for i in range(4 + number)]
        return {"model": chance.choice(["llama", "tuned"]), "prompt": prompt, "max_tokens": 16, "temperature": 0}

    def _check(self, asked: dict[str, Any], text: str) -> None:
        key = asked["model"], tuple(asked["prompt"])
        if self._first.setdefault(key, text) != text:
            self.problems.append(f"{key}: {text!r} where there was {self._first[key]!r}")

    def _text(self, client: openai.OpenAI, chance: random.Random) -> None:
        asked = self._asked(chance)
        self._check(asked, client.completions.create(**asked).choices[0].text)

    def _stream(self, client: openai.OpenAI, chance: random.Random) -> None:
        asked = self._asked(chance)
        self._check(asked, "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)))

    def _leave(self, client: openai.OpenAI, chance: random.Random) -> None:
        with client.completions.create(**self._asked(chance) | {"max_tokens": 150}, stream=True) as stream:
            for _, _piece in zip(range(chance.randrange(20)), stream, strict=False):
                pass

    def _chat(self, client: openai.OpenAI, chance: random.Random) -> None:
        messages: list[Any] = [{"role": "user", "content": f"w{20 + chance.randrange(_PROMPTS)}"}]
        client.chat.completions.create(model="llama", messages=messages, max_tokens=16)

    def _logprobs(self, client: openai.OpenAI, chance: random.Random) -> None:
        client.completions.create(**self._asked(chance) | {"echo": True, "logprobs": 3, "max_tokens": 1})

    def _choices(self, client: openai.OpenAI, chance: random.Random) -> None:
        client.completions.create(**self._asked(chance) | {"n": 3, "temperature": 1.0, "max_tokens": 8})

    def _refused(self, client: openai.OpenAI, chance: random.Random) -> None:
        try:
            client.completions.create(**self._asked(chance) | {"max_tokens": 10_000})
        except openai.BadRequestError:
            return
        self.problems.append("a request for too many tokens was answered")


def main() -> None:
    """Run, print Markdown; ends with 1 where a text changed, a request failed, or a figure grew by more than 5 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--round", type=float, default=60, help="seconds of one")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path, server = build_family("llama", Path(folder)), ForkServer()
        tokenizer = save_tokenizer(path, 128)
        tokenizer.chat_template = _TEMPLATE
        tokenizer.save_pretrained(path)
        with_adapter(transformers.AutoModelForCausalLM.from_pretrained(path)).save_pretrained(Path(folder, "tuned"))
        arguments = ["--adapter", f"tuned={folder}/tuned", "--prefix-tokens", "2000"]
        with new_swarm(server) as swarm:
            swarm.serve(path, "0:2", "2:5")
            with new_gateway(server, swarm, path, Path(folder), arguments) as gateway:
                soak, samples = GatewaySoak(gateway, options.clients), list[dict[str, float]]()
                until = time.monotonic() + 60 * options.minutes
                while time.monotonic() < until or len(samples) < 4:
                    soak.round(options.round, len(samples))
                    time.sleep(2)
                    samples.append(figures_of("gateway", gateway))
                    print(f"round {len(samples)}: {samples[-1]}, {len(soak.problems)} problems", file=sys.stderr)
    print(
        ", ".join(f"{count:,} {kind}" for kind, count in sorted(soak.done.items())) + f"; {len(soak.problems)} problems"
    )
    for problem in soak.problems[:20]:
        print(f"- {problem}")
    print("\n| figure | first third | last third | change |\n|---|---|---|---|")
    grown = False
    for name in samples[0]:
        first, last, _ = growth(samples[1:], name)
        grown |= last > 1.05 * first
        print(f"| {name} | {first:.1f} | {last:.1f} | {100 * (last / first - 1):+.1f} % |")
    if soak.problems or grown:
        sys.exit(1)


if __name__ == "__main__":
    main()
