"""A running `peer gateway` for tests, and what plain Transformers makes of the same prompts."""

import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tools.swarm import ForkServer, Peer, Swarm

_READY = re.compile(r"^ready .*url=(http://\S+)", re.M)


class RunningGateway(Peer):
    """The process."""

    url: str = ""

    def wait_ready(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.is_alive():
            if match := _READY.search(self.stdout.read_text() if self.stdout.exists() else ""):
                self.url = match[1]
                return
            time.sleep(0.02)
        raise AssertionError(f"the gateway did not get ready: {self.stderr.read_text()}")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self.options() | options)

    def options(self) -> dict[str, Any]:
        """Of OpenAI's clients."""
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}


@contextmanager
def new_gateway(
    server: ForkServer, swarm: Swarm, model: Path, folder: Path, options: Sequence[str] = ()
) -> Iterator[RunningGateway]:
    """A gateway to a swarm, which ends with the block."""
    join = ["--initial-peers", swarm.peers[0].address, "--port", "0"]
    out, err = folder / "gateway.out", folder / "gateway.err"
    gateway = RunningGateway(server.start(["gateway", str(model), *join, *options], out, err), out, err)
    try:
        gateway.wait_ready()
        yield gateway
    finally:
        if gateway.is_alive():
            gateway.stop(signal.SIGKILL)


class Local:
    """Plain Transformers."""

    def __init__(self, path: Path, model: Any = None):
        self.model = model or AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)

    @torch.no_grad()
    def tokens(self, prompt: str | Sequence[int], new: int, **options: Any) -> list[int]:
        """That follow a prompt: greedily, if `options` do not say otherwise."""
        ids = torch.tensor([self.ids(prompt)])
        options = {"do_sample": False, "pad_token_id": 0} | options
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, tokenizer=self.tokenizer, **options
        )
        return output[0, ids.shape[1] :].tolist()

    def text(self, prompt: str | Sequence[int], new: int, **options: Any) -> str:
        """As a completion has it."""
        ids = self.ids(prompt)
        tokens = self.tokens(ids, new, **options)
        before = self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([*ids, *tokens], skip_special_tokens=True)[len(before) :]

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary)"""
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
