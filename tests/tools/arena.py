"""A swarm to kill peers in, and what is done on it meanwhile."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LogitsProcessor

from tests.tools.swarm import Peer, Swarm

VOCABULARY, BLOCKS, PROMPT = 128, 5, 14
SPAN = "2:5"


@dataclass
class Arena:
    """Blocks 0:2 on a peer that lives; 2:5 on two peers, one for a test to kill, and in two parts on others."""

    path: Path
    swarm: Swarm
    parts: list[Peer]
    whole: list[Peer] = field(default_factory=list)

    def launch(self, *options: str) -> Peer:
        join = ("--initial-peers", self.swarm.peers[0].address, "--host", "127.0.0.1", "--threads", "1")
        return self.swarm.launch("serve", str(self.path), "--blocks", SPAN, *join, *options)

    def pair(self) -> tuple[Peer, Peer]:
        """A victim and its heir, both serving 2:5. The next victim is already being started."""
        self.whole = [peer for peer in self.whole if peer.is_alive()]
        while len(self.whole) < 3:
            self.whole.append(self.launch())
        for peer in self.whole[:2]:
            peer.wait_ready()
        return self.whole[0], self.whole[1]

    def connect(self, victim: Peer, then: list[Peer], **options: Any) -> Any:
        """A model that goes through the victim first; of 2:5 it knows only the victim and `then`."""
        options["allowed_peers"] = [peer.peer_id for peer in (self.swarm.peers[0], victim, *then)]
        model = self.swarm.connect(self.path, **options)
        for peer in then:
            model.swarm.health.measured(peer.peer_id, 9.0)  # far away, as far as anyone knows
        assert [hop.peer.peer_id for hop in model.swarm.route()][1:] == [victim.peer_id]
        return model


class AtToken(LogitsProcessor):
    """Does something while token number `count` is being chosen; notes the longest pause between two tokens."""

    def __init__(self, count: int, action: Callable[[], Any]):
        self.first, self.count, self.action = 0, count, action
        self.times: list[float] = []
        self.done = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or input_ids.shape[1]
        self.times.append(time.monotonic())
        if not self.done and input_ids.shape[1] - self.first >= self.count:
            self.done = True
            self.action()
            self.times.append(time.monotonic())
        return scores

    @property
    def stall(self) -> float:
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


def batch(new: int = 12) -> dict[str, Any]:
    """Three prompts of 14 tokens, the first with left padding; longer than the sliding windows of the families."""
    ids = torch.randint(3, VOCABULARY, (3, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new, "eos_token_id": None, "do_sample": False}


def one(new: int = 12) -> dict[str, Any]:
    """One prompt, with repetitions for prompt lookup to find."""
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    return batch(new) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_adapter(model: Any, method: str = "lora") -> Any:
    torch.manual_seed(7)
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if method == "prefix":
        return peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, **options))
    options |= {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(lora_dropout=0.2 if method == "dropout" else 0.0, **options))


def step(model: Any, between: Callable[[], Any] = lambda: None) -> list[torch.Tensor]:
    """Loss and gradients of a step, with something in between forward and backward."""
    model.train()
    torch.manual_seed(11)
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
    between()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    model.zero_grad()
    return [loss.detach(), *gradients]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)
