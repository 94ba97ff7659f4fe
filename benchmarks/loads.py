"""What clients do in chaos and soak runs: generations of several kinds, and LoRA training, all of them reproducible."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

VOCABULARY = 128


class Stopwatch(LogitsProcessor):
    """Notes the longest pause (seconds) before a token."""

    def __init__(self) -> None:
        self.longest, self._last = 0.0, time.monotonic()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now
        return scores


@dataclass
class Talk:
    """One generation to do: `kind` is one of `KINDS`, the prompts follow from `seed`."""

    kind: str
    seed: int
    length: int
    watch: Stopwatch = field(default_factory=Stopwatch)

    def say(self, model: Any, assistant: Any) -> torch.Tensor:
        """The tokens (rows, all tokens) that `model` says, maybe with the help of a local model."""
        return KINDS[self.kind](self, model, assistant)

    def generate(self, model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """`model.generate` without chance, watched."""
        options = {"max_new_tokens": self.length, "eos_token_id": None, "do_sample": False} | options
        options.setdefault("attention_mask", torch.ones_like(ids))
        said: torch.Tensor = model.generate(
            input_ids=ids, logits_processor=LogitsProcessorList([self.watch]), **options
        )
        return said

    def prompt(self, rows: int, tokens: int) -> torch.Tensor:
        """(rows, tokens), long."""
        return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(self.seed))


def _greedy(talk: Talk, model: Any, assistant: Any) -> torch.Tensor:
    ids = talk.prompt(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return talk.generate(model, ids, attention_mask=mask)


def _beams(talk: Talk, model: Any, assistant: Any) -> torch.Tensor:
    return talk.generate(model, talk.prompt(2, 11), num_beams=3)


def _turns(talk: Talk, model: Any, assistant: Any) -> torch.Tensor:
    """A conversation, of which a copy goes its own way."""
    cache, ids, said = DynamicCache(config=model.config), talk.prompt(1, 9), []
    length = max(talk.length // 4, 1)
    for turn in range(3):
        ids = talk.generate(model, ids, past_key_values=cache, max_new_tokens=length)
        twin = copy.deepcopy(cache)
        words = talk.prompt(3, 4)
        aside = torch.cat([ids, words[turn : turn + 1]], 1)
        said.append(talk.generate(model, aside, past_key_values=twin, max_new_tokens=length)[:, -length:])
        ids = torch.cat([ids, words[turn : turn + 1].flip(1)], 1)
    return torch.cat([ids, *said], 1)


def _assisted(talk: Talk, model: Any, assistant: Any) -> torch.Tensor:
    return talk.generate(model, talk.prompt(1, 8), assistant_model=assistant)


def _lookup(talk: Talk, model: Any, assistant: Any) -> torch.Tensor:
    return talk.generate(model, talk.prompt(1, 5).repeat(1, 3), prompt_lookup_num_tokens=4)


KINDS: dict[str, Callable[[Talk, Any, Any], torch.Tensor]] = {
    "greedy": _greedy,
    "beams": _beams,
    "turns": _turns,
    "assisted": _assisted,
    "lookup": _lookup,
}


def with_lora(model: Any, seed: int = 7, rank: int = 4) -> Any:
    """LoRA on q and v whose matrices are not zero, the same for every model of these sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **options))


def train(model: Any, seed: int, steps: int, after: Callable[[float], None] = lambda seconds: None) -> list[float]:
    """The losses of so many steps of AdamW on 2 rows of 14 tokens; `after` each step is told what it took."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
    chance, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        ids = torch.randint(3, VOCABULARY, (2, 14), generator=chance)
        begin = time.monotonic()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(time.monotonic() - begin)
    return losses
